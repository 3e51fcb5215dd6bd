"""The guard in a bare torch loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gradguard import GuardEngine, Pathology
from lightning_gradguard.guard import DEVICE_DELAY
from lightning_gradguard.respond import (
    ActionKind,
    AdaptiveClip,
    LearningRateBackoff,
    SkipBadSteps,
    UpdateCap,
)
from tests.guard.loops import MAKERS, Loop, rmsprop
from tests.models import (
    NORM_TOLERANCE,
    Regression,
    adamw,
    assert_same_bits,
    assert_untouched,
    fused_adamw,
    make_batches,
    plain_loop,
)

OPTIMIZERS = pytest.mark.parametrize(
    "make_optimizer", [*MAKERS.values(), rmsprop], ids=[*MAKERS, "rmsprop"]
)
NONE: dict[str, Any] = dict.fromkeys(("clip", "cap", "skip", "backoff", "rollback"))


@OPTIMIZERS
@pytest.mark.parametrize("mode", ["protect", "observe"])
def test_history_is_what_a_plain_loop_computes(mode: str, make_optimizer: Any) -> None:
    batches = make_batches(30)
    loop = Loop(make_optimizer, mode=mode, **NONE).run(batches)
    loop.guard.close()
    plain = Regression(make_optimizer)
    run = plain_loop(plain, batches)
    history = loop.guard.history
    assert [row.step for row in history] == list(range(30))
    assert [row.total_norm for row in history] == pytest.approx(run.norms, rel=NORM_TOLERANCE)
    assert [row.loss for row in history] == pytest.approx(run.losses, rel=1e-6)
    for row in history:
        assert (row.clip_coef, row.lr_scale, row.max_ratio) == (1.0, 1.0, math.inf)
        assert (row.capped_tensors, row.skipped, row.clip_threshold) == (0, False, math.inf)
    assert_same_bits(loop.model.state_dict(), plain.state_dict())


@OPTIMIZERS
def test_observing_never_changes_a_bit(make_optimizer: Any) -> None:
    batches = make_batches(40, poisoned=(20,))
    batches[10] = (batches[10][0] * 1e3, batches[10][1])
    loop = Loop(make_optimizer, mode="observe").run(batches)
    loop.guard.close()
    plain = Regression(make_optimizer)
    run = plain_loop(plain, batches)
    assert_same_bits(loop.model.state_dict(), plain.state_dict())
    assert_same_bits(loop.optimizer.state_dict(), run.optimizer.state_dict())
    assert loop.guard.findings[-1].pathology is Pathology.NON_FINITE
    assert loop.guard.actions == []
    assert not loop.guard.should_stop
    assert loop.guard.counts["skipped_steps"] == 0


@OPTIMIZERS
def test_a_bad_step_is_as_if_it_was_never_taken(make_optimizer: Any) -> None:
    batches = make_batches(20, poisoned=(0, 9, 10))
    loop = Loop(make_optimizer, **{**NONE, "skip": SkipBadSteps()}).run(batches)
    loop.guard.close()
    plain = Regression(make_optimizer)
    run = plain_loop(plain, batches, omit={0, 9, 10})
    assert_same_bits(loop.model.state_dict(), plain.state_dict())
    assert_same_bits(loop.optimizer.state_dict(), run.optimizer.state_dict())
    assert [row.step for row in loop.guard.history if row.skipped] == [0, 9, 10]
    assert loop.guard.counts["skipped_steps"] == 3
    assert [a.step for a in loop.guard.actions if a.kind is ActionKind.SKIP] == [0, 9, 10]


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_without_skipping_no_step_is_called_skipped(make_optimizer: Any) -> None:
    batches = make_batches(30)
    batches[25] = (batches[25][0], batches[25][1] * 1e30)  # its loss and gradient are infinite
    loop = Loop(make_optimizer, **{**NONE, "clip": AdaptiveClip()}).run(batches)
    loop.guard.close()
    assert not math.isfinite(loop.guard.history[25].total_norm)
    assert not any(row.skipped for row in loop.guard.history)


@OPTIMIZERS
def test_the_default_guard_lets_an_ordinary_run_learn(make_optimizer: Any) -> None:
    loop = Loop(make_optimizer).run(make_batches(200))
    losses = [row.loss for row in loop.guard.history]
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    assert loop.guard.active
    assert loop.guard.counts["skipped_steps"] == 0


def test_the_history_of_a_fused_optimizer_is_late_until_the_end() -> None:
    loop = Loop(fused_adamw).run(make_batches(10))
    assert len(loop.guard.history) == 10 - DEVICE_DELAY
    loop.guard.close()
    assert [row.step for row in loop.guard.history] == list(range(10))
    loop.guard.close()
    assert len(loop.guard.history) == 10


@OPTIMIZERS
def test_closing_leaves_nothing_behind(make_optimizer: Any) -> None:
    loop = Loop(make_optimizer)
    rate = loop.optimizer.param_groups[0]["lr"]
    loop.run(make_batches(5))
    assert_hooked = loop.optimizer._optimizer_step_post_hooks
    assert len(assert_hooked) == 1
    loop.guard.close()
    assert_untouched(loop.optimizer, rate)
    before = len(loop.guard.history)
    loop.run(make_batches(3))
    assert len(loop.guard.history) == before
    assert not any(p._backward_hooks for p in loop.model.parameters())


@OPTIMIZERS
def test_nothing_is_left_on_the_optimizer_between_steps(make_optimizer: Any) -> None:
    backoff = LearningRateBackoff(factor=0.5, cooldown_steps=0)
    loop = Loop(make_optimizer, backoff=backoff)
    (group,) = loop.optimizer.param_groups
    rate = group["lr"]
    loop.guard._pipeline.ladder.rate.scale = 0.25  # as after two cuts
    for batch in make_batches(5):
        loop.step(batch)
        assert group["lr"] == rate
        assert not hasattr(loop.optimizer, "found_inf")
        assert not hasattr(loop.optimizer, "grad_scale")
    loop.guard.close()
    assert {row.lr_scale for row in loop.guard.history} == {0.25}


@OPTIMIZERS
@pytest.mark.parametrize("announced_again", [False, True])
def test_a_step_that_never_came(make_optimizer: Any, announced_again: bool) -> None:
    """A user who skips steps of their own: the rate and the controls come off all the same."""
    loop = Loop(make_optimizer)
    rate = loop.optimizer.param_groups[0]["lr"]
    loop.guard._pipeline.ladder.rate.scale = 0.5
    loop.run(make_batches(3))
    loss = loop.model.loss(make_batches(1)[0])
    loss.backward()
    loop.guard.before_step(loss)
    if announced_again:
        loop.guard.before_step(loss)
    loop.guard.close()
    assert loop.guard.active is False
    assert_untouched(loop.optimizer, rate)


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda v: torch.tensor([v]), None])
def test_kinds_of_loss(kind: Any) -> None:
    loop = Loop()
    for batch in make_batches(4):
        loop.optimizer.zero_grad()
        loss = loop.model.loss(batch)
        loss.backward()
        loop.guard.before_step(None if kind is None else kind(loss.item()))
        loop.optimizer.step()
        expected = None if kind is None else pytest.approx(loss.item())
        assert loop.guard.history[-1].loss == expected
    assert loop.guard.active


def test_a_step_without_any_gradient_does_not_count() -> None:
    loop = Loop()
    loop.optimizer.zero_grad()
    loop.guard.before_step(1.0)
    loop.optimizer.step()
    assert loop.guard.history == []
    loop.run(make_batches(2))
    assert [row.step for row in loop.guard.history] == [0, 1]


@OPTIMIZERS
@pytest.mark.parametrize("at", [1, 6, 17])
@pytest.mark.parametrize("max_ratio", [0.005, 100.0], ids=["binding", "loose"])
def test_groups_can_be_added_at_any_time(make_optimizer: Any, at: int, max_ratio: float) -> None:
    cap = UpdateCap(max_ratio, start_ratio=max_ratio, min_ratio=max_ratio, adaptive=False)
    loop = Loop(make_optimizer, cap=cap)
    extra = nn.Parameter(torch.ones(3))
    loop.model.register_parameter("extra", extra)
    original = loop.model.forward
    loop.model.forward = lambda inputs: original(inputs) + loop.model.extra.sum() * 0.01
    batches = make_batches(25)
    loop.run(batches[:at])
    loop.optimizer.add_param_group({"params": [extra], "lr": 0.5})
    for batch in batches[at:]:
        before = extra.detach().clone()
        loop.step(batch)
        assert (extra - before).norm() <= max_ratio * before.norm() * 1.2
    loop.guard.close()
    assert not torch.equal(extra, torch.ones(3))
    assert len(loop.guard.history) == 25, "the guard gave up"
    assert "extra" in loop.guard.last_norms.names


@OPTIMIZERS
def test_parameters_can_be_frozen_and_thawed(make_optimizer: Any) -> None:
    loop = Loop(make_optimizer)
    batches = make_batches(30)
    for number, batch in enumerate(batches):
        for p in loop.model.body.parameters():
            p.requires_grad_(not 10 <= number < 20)
        frozen = copy.deepcopy(loop.model.body.state_dict())
        loop.step(batch)
        changed = not torch.equal(frozen["0.weight"], loop.model.body.state_dict()["0.weight"])
        assert changed == (not 10 <= number < 20)
        present = dict(zip(loop.guard.last_norms.names, loop.guard.last_norms.present, strict=True))
        assert present["body.0.weight"] == changed
    loop.guard.close()
    assert len(loop.guard.history) == 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@OPTIMIZERS
def test_models_of_another_dtype(make_optimizer: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    optimizer = make_optimizer(model.parameters())
    guard = GuardEngine(model, optimizer)
    for inputs, targets in make_batches(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs.to(dtype)), targets.to(dtype))
        loss.backward()
        guard.before_step(loss)
        optimizer.step()
    guard.close()
    assert len(guard.history) == 40, "the guard gave up"
    assert guard.history[-1].loss < guard.history[0].loss


def test_the_run_is_asked_to_stop_when_skipping_does_not_help() -> None:
    for make_optimizer in MAKERS.values():
        loop = Loop(make_optimizer, skip=SkipBadSteps(max_consecutive=4), rollback=None)
        before = loop.weights()
        loop.run(make_batches(10, poisoned=range(10)))
        loop.guard.close()
        assert loop.guard.should_stop
        assert [a.kind for a in loop.guard.actions].count(ActionKind.STOP) == 1
        assert_same_bits(loop.weights(), before)


def test_two_guards_on_two_optimizers_keep_apart() -> None:
    model = Regression()
    optimizers = [adamw(model.body.parameters()), adamw(model.head.parameters())]
    guards = [GuardEngine(model, optimizer) for optimizer in optimizers]
    for batch in make_batches(5):
        model.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        for guard, optimizer in zip(guards, optimizers, strict=True):
            guard.before_step(loss)
            optimizer.step()
    assert [guard.last_norms.names for guard in guards] == [
        ("body.0.weight", "body.0.bias"),
        ("head.weight", "head.bias"),
    ]
    assert [len(guard.history) for guard in guards] == [5, 5]


@OPTIMIZERS
def test_an_inspection_reads_the_update_that_the_cap_has_left(make_optimizer: Any) -> None:
    cap = UpdateCap(0.01, start_ratio=0.01, min_ratio=0.01, adaptive=False)
    loop = Loop(make_optimizer, cap=cap)
    for group in loop.optimizer.param_groups:
        group["lr"] = 10.0
    loop.run(make_batches(2 + 2 * DEVICE_DELAY))
    loop.guard.close()
    inspection = loop.guard.recorder.inspection
    assert inspection is not None
    ratios = [reading.update_ratio for reading in inspection.parameters]
    assert all(0.0 < ratio < 0.02 for ratio in ratios)
