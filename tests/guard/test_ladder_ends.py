"""Whatever comes, the ladder ends; and the weights can be used at any time until then."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.guard import DEVICE_DELAY
from lightning_gradguard.respond import (
    ActionKind,
    LayerBoost,
    LearningRateBackoff,
    SkipBadSteps,
    UpdateCap,
    WeightRollback,
)
from tests.guard.loops import MAKERS, Loop, rmsprop
from tests.models import Batch, assert_same_bits, make_batches

ALL_MAKERS = {**MAKERS, "rmsprop": rmsprop}
SKIP = SkipBadSteps(outlier_factor=100.0, max_consecutive=6)
ROLLBACK = WeightRollback(every_n_steps=4, max_rollbacks=2)
BACKOFF = LearningRateBackoff(factor=0.5, min_scale=0.1, cooldown_steps=3, recovery_steps=4)
RUNGS: dict[str, Any] = {
    "cap": UpdateCap(window=4),
    "skip": SKIP,
    "backoff": BACKOFF,
    "rollback": ROLLBACK,
    "boost": LayerBoost(),
}
# As a user's own holds, and as that of the guard does.
CAPS = st.sampled_from([UpdateCap(window=4), UpdateCap(window=4, on_evidence=True)])
# Steps in a row that are not finite between two looks at the weights, and until one is known of.
LOOK = 8

# What data, the loss or a schedule can do to a step.
SCALES = {"nan": math.nan, "inf": math.inf, "spike": 1e6, "huge": 1e30, "tiny": 1e-30}
FAULTS = ("none", *SCALES, "rate", "overflow")
# What breaks the weights themselves, from outside.
DAMAGE = ("nan weight", "inf weight")


def spread(plan: Sequence[tuple[str, int]]) -> Iterator[str]:
    for fault, times in plan:
        yield from [fault] * times


def faulty_step(loop: Loop, batch: Batch, fault: str) -> None:
    groups = loop.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    if fault in DAMAGE:
        with torch.no_grad():
            loop.model.head.weight[0, 0] = math.nan if fault == "nan weight" else math.inf
    if fault == "rate":
        for group in groups:
            group["lr"] *= 1e3
    if fault == "overflow":  # of the float32 range, within the model
        batch = (batch[0] * 1e38, batch[1])
    loop.step(batch, loss_scale=SCALES.get(fault, 1.0))
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def is_finite(loop: Loop) -> bool:
    return all(p.isfinite().all() for p in loop.model.parameters())


def plans(faults: Sequence[str]) -> st.SearchStrategy[list[tuple[str, int]]]:
    return st.lists(st.tuples(st.sampled_from(faults), st.integers(1, 9)), max_size=6)


def check_bounds(loop: Loop) -> None:
    """No budget is overspent, and the run is asked to stop once."""
    kinds = [action.kind for action in loop.guard.actions]
    assert loop.guard.active
    ladder: Any = loop.guard._pipeline.ladder
    # A cap on evidence begins to hold by going back once more.
    assert (
        loop.guard.counts["rollbacks"] <= ROLLBACK.max_rollbacks + ladder.settings.cap.on_evidence
    )
    assert kinds.count(ActionKind.STOP) == loop.guard.should_stop
    assert not any(row.capped_tensors for row in loop.guard.history if row.skipped)
    assert BACKOFF.min_scale <= ladder.rate.scale <= 1.0


@pytest.mark.parametrize("name", ALL_MAKERS)
@given(plan=plans(FAULTS), cap=CAPS)
@settings(max_examples=20, deadline=None)
def test_no_step_ever_leaves_weights_that_are_not_finite(
    name: str, plan: list[tuple[str, int]], cap: UpdateCap
) -> None:
    loop = Loop(ALL_MAKERS[name], **{**RUNGS, "cap": cap})
    for batch, fault in zip(make_batches(60), spread([("none", 3), *plan]), strict=False):
        faulty_step(loop, batch, fault)
        assert is_finite(loop), fault
    check_bounds(loop)
    loop.guard.close()
    assert is_finite(loop)


@pytest.mark.parametrize("name", ALL_MAKERS)
@given(plan=plans((*FAULTS, *DAMAGE)), cap=CAPS)
@settings(max_examples=20, deadline=None)
def test_weights_that_are_broken_from_outside_are_whole_again_soon(
    name: str, plan: list[tuple[str, int]], cap: UpdateCap
) -> None:
    loop = Loop(ALL_MAKERS[name], **{**RUNGS, "cap": cap})
    broken = 0
    for batch, fault in zip(make_batches(60), spread([("none", 3), *plan]), strict=False):
        faulty_step(loop, batch, fault)
        broken = 0 if is_finite(loop) or fault in DAMAGE else broken + 1
        assert broken <= LOOK + 2 * DEVICE_DELAY
    loop.run(make_batches(LOOK + 2 * DEVICE_DELAY))
    check_bounds(loop)
    assert is_finite(loop)
    loop.guard.close()


@pytest.mark.parametrize("name", ["adamw", "fused_sgd"])
@pytest.mark.parametrize("fault", ["nan", "inf", *DAMAGE])
def test_a_run_that_stays_bad_is_stopped_after_a_known_number_of_steps(
    name: str, fault: str
) -> None:
    """Each budget once, the steps that are known late each time, and no more."""
    loop = Loop(MAKERS[name], **RUNGS).run(make_batches(30))
    most = (ROLLBACK.max_rollbacks + 1) * (SKIP.max_consecutive + DEVICE_DELAY)
    for number, batch in enumerate(make_batches(most)):
        assert number < most
        faulty_step(loop, batch, fault)
        if loop.guard.should_stop:
            break
    assert loop.guard.should_stop
    check_bounds(loop)
    loop.guard.close()
    assert is_finite(loop)
    assert loop.guard.counts["rollbacks"] == ROLLBACK.max_rollbacks


# -- a resume in the middle of a back-off ----------------------------------------------------------

STEPS = 110
SLOW_BACKOFF = LearningRateBackoff(cooldown_steps=8, recovery_steps=8)
# Every update is large and the loss hardly changes, so that smaller ones are tried again and again.
BACKING_OFF: dict[str, Any] = {
    "cap": UpdateCap(max_ratio=1e-3, window=6),
    "backoff": SLOW_BACKOFF,
    "rollback": None,
}
SKIPPED = (52, 53, 54, 70, 71)
AT = (9, 12, 15, 36, 46, 47, 49, 53, 54, 57, 60, 71, 72, 74, 81)


def loss_scale(step: int) -> float:
    return 60.0 if 40 <= step < 62 or 75 <= step < 80 else 1.0


def through_a_file(loop: Loop) -> Any:
    file = io.BytesIO()
    parts = (loop.model.state_dict(), loop.optimizer.state_dict(), loop.guard.state_dict())
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(loop: Loop) -> Any:
    return [loop.model.state_dict(), loop.optimizer.state_dict(), loop.guard.state_dict()]


def stage(loop: Loop) -> set[str]:
    """What the ladder is in the middle of."""
    ladder: Any = loop.guard._pipeline.ladder
    stages = {
        "trial": ladder.schedule.trial is not None,
        "patience": ladder.schedule._patience > 1,
        "cooldown": not ladder.rate.settled,
        "recovery": ladder.rate.settled and ladder.rate.scale < 1.0,
        "skip streak": ladder.budget.consecutive > 0,
    }
    return {name for name, holds in stages.items() if holds}


@pytest.mark.parametrize("name", ALL_MAKERS)
def test_a_back_off_goes_on_after_a_resume_as_if_nothing_had_been(name: str) -> None:
    batches = make_batches(STEPS, poisoned=SKIPPED)
    whole, saved, stages = Loop(ALL_MAKERS[name], **BACKING_OFF), {}, set()
    for step, batch in enumerate(batches):
        if step in AT:
            saved[step] = through_a_file(whole)
            stages |= stage(whole)
        whole.step(batch, loss_scale=loss_scale(step))
    assert stages == {"trial", "patience", "cooldown", "recovery", "skip streak"}
    for at, (model, optimizer, guard) in saved.items():
        resumed = Loop(ALL_MAKERS[name], **BACKING_OFF)
        resumed.model.load_state_dict(model)
        resumed.optimizer.load_state_dict(optimizer)
        resumed.guard.load_state_dict(guard)
        for step in range(at, STEPS):
            resumed.step(batches[step], loss_scale=loss_scale(step))
        assert_same_bits(everything(resumed), everything(whole), f"resumed at {at}")


@pytest.mark.parametrize("name", ALL_MAKERS)
def test_the_cut_of_a_rollback_goes_on_after_a_resume(name: str) -> None:
    """As do the rollbacks that are left, and what is known of the weights that were put back."""
    how = {**BACKING_OFF, "rollback": WeightRollback(every_n_steps=10, max_rollbacks=3)}
    batches = make_batches(70)
    whole, saved = Loop(ALL_MAKERS[name], **how), {}
    for step, batch in enumerate(batches):
        if step == 33:
            with torch.no_grad():
                whole.model.head.weight[0, 0] = math.nan
        if step in (37, 39, 45):
            saved[step] = through_a_file(whole)
        whole.step(batch)
    assert whole.guard.counts["rollbacks"] == 1
    assert any(row.lr_scale < 1.0 for row in whole.guard.history)
    for at, (model, optimizer, guard) in saved.items():
        resumed = Loop(ALL_MAKERS[name], **how)
        resumed.model.load_state_dict(model)
        resumed.optimizer.load_state_dict(optimizer)
        resumed.guard.load_state_dict(guard)
        resumed.run(batches[at:])
        assert_same_bits(everything(resumed), everything(whole), f"resumed at {at}")
