"""An error inside the guard never ends the run, and leaves nothing behind."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from lightning_gradguard import guard as guard_module
from lightning_gradguard.measure import NormMeter
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.record import Recorder
from lightning_gradguard.respond import apply as apply_module
from lightning_gradguard.respond.ladder import Ladder
from lightning_gradguard.respond.learning_rate import ScaledLearningRate
from lightning_gradguard.respond.update_bounds import GradientBound, StepSizeBound
from tests.guard.loops import MAKERS, Loop
from tests.models import Regression, assert_same_bits, assert_untouched, make_batches, plain_loop

# Parts that raise at one step or another: when measuring, deciding, acting and recording.
PARTS: list[tuple[Any, str]] = [
    (NormMeter, "measure"),
    (Ladder, "plan"),
    (Ladder, "observe"),
    (Pipeline, "take"),
    (Recorder, "step"),
    (ScaledLearningRate, "apply"),
    (GradientBound, "signal"),
    (GradientBound, "before_step"),
    (GradientBound, "after_step"),
    (StepSizeBound, "signal"),
    (StepSizeBound, "before_step"),
    (StepSizeBound, "after_step"),
    (guard_module, "apply_on_host"),
    (apply_module.FusedControls, "apply"),
]


def fail(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("by design")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("owner", "part"), PARTS, ids=lambda p: getattr(p, "__name__", p))
def test_an_error_in_any_part_turns_the_guard_off_and_nothing_else(
    owner: Any, part: str, name: str, monkeypatch: Any, caplog: Any
) -> None:
    batches = make_batches(20)
    loop = Loop(MAKERS[name], clip=None, cap=None, skip=None)
    if "Bound" in owner.__name__:
        loop = Loop(MAKERS[name], clip=None, skip=None)
        if type(loop.guard._watched.bound) is not owner:
            pytest.skip("of the other family")
    rate = loop.optimizer.param_groups[0]["lr"]
    loop.guard._pipeline.ladder.rate.scale = 0.5  # so that there is something to restore
    loop.run(batches[:5])
    reference = Regression(MAKERS[name])
    reference.load_state_dict(loop.model.state_dict())
    state = copy.deepcopy(loop.optimizer.state_dict())
    monkeypatch.setattr(owner, part, fail)
    with caplog.at_level(logging.ERROR, logger="lightning_gradguard"):
        loop.run(batches[5:12])
    monkeypatch.undo()
    if loop.guard.active:
        pytest.skip("not part of this optimizer's step")
    assert_untouched(loop.optimizer, rate)
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "ZeroDivisionError: by design" in errors[0].getMessage()
    assert errors[0].exc_info is not None

    weights = loop.weights()
    loop.run(batches[12:])
    assert not torch.equal(loop.weights()["head.weight"], weights["head.weight"])
    assert len(loop.guard.history) <= 5 + 7
    loop.guard.close()
    assert loop.guard.report()

    # From the step of the error on, training is what it would be without the guard.
    optimizer = reference.configure_optimizers()
    optimizer.load_state_dict(state)
    reference.configure_optimizers = lambda: optimizer
    if part in ("measure", "plan", "signal"):
        plain_loop(reference, batches[5:])
        assert_same_bits(loop.model.state_dict(), reference.state_dict())


def test_the_parts_that_raise_are_the_parts_in_use(monkeypatch: Any) -> None:
    """The skips above must not hide that nothing was tried."""
    tried = set()
    for name in MAKERS:
        for owner, part in PARTS:
            loop = Loop(MAKERS[name])
            with monkeypatch.context() as patch:
                patch.setattr(owner, part, fail)
                loop.run(make_batches(4))
            if not loop.guard.active:
                tried.add((owner, part))
    assert tried == set(PARTS)


def test_an_interrupt_is_no_failure_of_the_guard(monkeypatch: Any) -> None:
    loop = Loop()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NormMeter, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.run(make_batches(1))


def test_an_error_of_the_optimizer_is_the_users() -> None:
    """It is raised, and the next step goes on under the guard."""
    loop = Loop()
    batches = make_batches(6)
    loop.guard._pipeline.ladder.rate.scale = 0.5
    rate = loop.optimizer.param_groups[0]["lr"]
    loop.run(batches[:2])
    handle = loop.optimizer.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loop.run(batches[2:3])
    handle.remove()
    loop.run(batches[3:])
    assert loop.guard.active
    assert [row.step for row in loop.guard.history] == [0, 1, 2, 3, 4]
    loop.guard.close()
    assert_untouched(loop.optimizer, rate)
