"""A run that is interrupted and resumed is the uninterrupted one, bit for bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.guard import DEVICE_DELAY
from lightning_gradguard.respond import LearningRateBackoff, UpdateCap
from tests.guard.loops import MAKERS, Loop, rmsprop
from tests.models import assert_same_bits, make_batches

OPTIMIZERS = pytest.mark.parametrize(
    "make_optimizer", [*MAKERS.values(), rmsprop], ids=[*MAKERS, "rmsprop"]
)
STEPS = 60
ARGUMENTS: dict[str, Any] = {
    "cap": UpdateCap(max_ratio=0.02, start_ratio=0.01, min_ratio=0.001, window=5),
    "backoff": LearningRateBackoff(cooldown_steps=5, recovery_steps=5),
}
HOW: dict[str, dict[str, Any]] = {"protect": ARGUMENTS, "observe": {"mode": "observe"}}


def batches() -> list[Any]:
    """An outlier, steps that are not finite, and targets that grow so that the rate is cut."""
    result = make_batches(STEPS, poisoned=(21, 22))
    for step in range(25, 45):
        inputs, targets = result[step]
        result[step] = (inputs, targets * 50.0)
    inputs, targets = result[18]
    result[18] = (inputs * 100.0, targets)
    return result


def checkpoint(loop: Loop) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(
        {
            "model": loop.model.state_dict(),
            "optimizer": loop.optimizer.state_dict(),
            "guard": loop.guard.state_dict(),
        },
        file,
    )
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(make_optimizer: Any, state: dict[str, Any], mode: str) -> Loop:
    loop = Loop(make_optimizer, **HOW[mode])
    loop.model.load_state_dict(state["model"])
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.guard.load_state_dict(state["guard"])
    return loop


def identity(finding: Finding) -> tuple[str, str, int | None]:
    return finding.pathology.value, finding.where, finding.since


@OPTIMIZERS
@pytest.mark.parametrize("mode", ["protect", "observe"])
@pytest.mark.parametrize("at", [1, 17, 19, 22, 23, 24, 40])
def test_an_interrupted_run_is_the_uninterrupted_one(
    make_optimizer: Any, mode: str, at: int
) -> None:
    data = batches()
    if mode == "observe":
        data = [b for number, b in enumerate(data) if number not in (21, 22)]
    whole = Loop(make_optimizer, **HOW[mode]).run(data)
    first = Loop(make_optimizer, **HOW[mode]).run(data[:at])
    second = resume(make_optimizer, checkpoint(first), mode).run(data[at:])
    for loop in (whole, second):
        loop.guard.close()
    assert_same_bits(second.model.state_dict(), whole.model.state_dict())
    assert_same_bits(second.optimizer.state_dict(), whole.optimizer.state_dict())
    for name in ("history", "actions"):
        seen = getattr(first.guard, name) + getattr(second.guard, name)
        assert repr(seen) == repr(getattr(whole.guard, name)), name
    # What is open at the checkpoint goes on as the same finding.
    found = {identity(f): f for guard in (first.guard, second.guard) for f in guard.findings}
    assert found == {identity(f): f for f in whole.guard.findings}
    assert_same_bits(second.guard.state_dict(), whole.guard.state_dict())


def test_the_scenario_uses_every_rung() -> None:
    """Otherwise the test above would not compare much."""
    for make_optimizer in MAKERS.values():
        loop = Loop(make_optimizer, **ARGUMENTS).run(batches())
        loop.guard.close()
        history = loop.guard.history
        assert any(row.skipped for row in history)
        assert any(0.0 < row.clip_coef < 1.0 for row in history)
        assert any(row.capped_tensors for row in history)
        assert len({row.max_ratio for row in history}) > 1
        assert loop.guard.findings


def test_what_was_not_finite_is_named_after_a_resume_in_the_middle_of_it() -> None:
    """On a fused optimizer the steps before a checkpoint are judged after it."""
    data = make_batches(12, poisoned=(7,))
    first = Loop(MAKERS["fused_adamw"], **ARGUMENTS).run(data[:8])
    assert first.guard.findings == []
    second = resume(MAKERS["fused_adamw"], checkpoint(first), "protect").run(data[8:])
    second.guard.close()
    assert [f.step for f in second.guard.findings] == [7]
    # With a loss that is NaN all gradients are: their norms cannot tell where it began.
    assert second.guard.findings[0].where == "model"
    assert second.guard.findings[0].evidence["non_finite_parameters"] == 4.0


@OPTIMIZERS
def test_saving_changes_nothing(make_optimizer: Any) -> None:
    data = batches()
    whole = Loop(make_optimizer, **ARGUMENTS).run(data)
    saved = Loop(make_optimizer, **ARGUMENTS)
    for batch in data:
        saved.step(batch)
        saved.guard.state_dict()
    assert_same_bits(saved.model.state_dict(), whole.model.state_dict())
    assert repr(saved.guard.history) == repr(whole.guard.history)


def test_a_state_from_another_set_of_rungs() -> None:
    data = make_batches(30)
    for one, other in ((ARGUMENTS, {"cap": None}), ({"cap": None, "skip": None}, ARGUMENTS)):
        first = Loop(**one).run(data[:20])
        second = Loop(**other)
        second.guard.load_state_dict(checkpoint(first)["guard"])
        second.run(data[20:])
        assert len(second.guard.history) == 10
        assert second.guard.history[0].step == 20


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_from_a_model_of_another_size(name: str) -> None:
    """As after fine-tuning with a new head: what depends on the tensors starts afresh."""
    data = make_batches(30)
    first = Loop(MAKERS[name], **ARGUMENTS).run(data[: 17 + DEVICE_DELAY])
    second = Loop(MAKERS[name], **ARGUMENTS)
    extra = torch.nn.Parameter(torch.ones(3))
    second.optimizer.add_param_group({"params": [extra]})
    second.guard._watch_parameters()
    second.guard.load_state_dict(checkpoint(first)["guard"])
    second.run(data[20:])
    second.guard.close()
    assert second.guard.history[-1].step == 17 + DEVICE_DELAY + 9, "the guard gave up"
