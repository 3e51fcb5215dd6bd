"""A cap that binds on evidence only: a run that gives none is left alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.respond import ActionKind, LearningRateBackoff, UpdateCap, WeightRollback
from lightning_gradguard.respond.clip_thresholds import EVERYTHING
from lightning_gradguard.respond.ladder import Ladder, LadderSettings
from lightning_gradguard.respond.ratio_schedule import RatioSchedule

CAP = UpdateCap(window=10, on_evidence=True)
LOSS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(-10, 10))
STEPS = st.lists(st.tuples(LOSS, st.floats(0.0, 1.0)), max_size=150)
EXPLODES = [2.3, 2.3, 10.0, 20.0]


def trusting(cap: UpdateCap = CAP) -> RatioSchedule:
    return RatioSchedule(cap, trusting=True)


def feed(schedule: RatioSchedule, losses: list[float], large: float = 1.0) -> list[Any]:
    """Cap, scale of the learning rate and whether weights are asked for, after each step."""
    seen = []
    for loss in losses:
        schedule.advance(loss, large)
        seen.append((schedule.ratio, schedule.lr_scale, schedule.asks_back))
    return seen


def wave(level: float, count: int = CAP.window) -> list[float]:
    return [level + 0.1 * (step % 2) for step in range(count)]


@given(losses=st.lists(LOSS, max_size=150), large=st.floats(0.0, 1 / 3))
def test_a_run_whose_updates_are_small_is_left_alone(losses: list[float], large: float) -> None:
    assert set(feed(trusting(), losses, large)) <= {(math.inf, 1.0, False)}


@given(losses=st.lists(st.floats(-10, 10), max_size=150))
def test_large_updates_under_a_loss_that_falls_are_never_capped(losses: list[float]) -> None:
    for ratio, _, asks_back in feed(trusting(), sorted(losses, reverse=True)):
        assert math.isinf(ratio)
        assert not asks_back


@given(steps=STEPS)
def test_it_ends_once_and_stays_within_its_bounds(steps: list[Any]) -> None:
    schedule, asked = trusting(), 0
    for loss, large in steps:
        schedule.advance(loss, large)
        asked += schedule.asks_back
        assert asked == 0 or not schedule.trusting
        assert 1 / 30 <= schedule.lr_scale <= 1.0
        assert schedule.trusting == math.isinf(schedule.ratio)
        if not schedule.trusting:
            assert schedule.lr_scale == 1.0
            assert CAP.least_ratio <= schedule.ratio <= CAP.max_ratio
    assert asked <= 1


@given(steps=STEPS)
def test_what_follows_is_what_a_cap_does_that_binds_from_the_start(steps: list[Any]) -> None:
    schedule, strict = trusting(), RatioSchedule(CAP)
    assert feed(schedule, EXPLODES)[-1] == (CAP.first_ratio, 1.0, True)
    for loss, large in steps[:99]:  # windows grow with all steps there were, a little later
        assert schedule.advance(loss, large) == strict.advance(loss, large)
        assert schedule.ratio == strict.ratio


@given(steps=STEPS, at=st.integers(0, 150))
@settings(max_examples=50)
def test_state_round_trip(steps: list[Any], at: int) -> None:
    saved, kept = trusting(), trusting()
    for number, (loss, large) in enumerate(steps):
        if number == at:
            state = saved.state_dict()
            saved = trusting()
            saved.load_state_dict(state)
        assert saved.advance(loss, large) == kept.advance(loss, large)
        assert (saved.ratio, saved.lr_scale) == (kept.ratio, kept.lr_scale)
        assert saved.asks_back == kept.asks_back


def test_a_loss_that_rises_later_lowers_the_learning_rate() -> None:
    schedule = trusting()
    feed(schedule, [*wave(5.0), *wave(4.0), *wave(3.0)])
    assert feed(schedule, wave(6.0))[-1] == (math.inf, CAP.retreat, False)
    assert feed(schedule, wave(5.0))[-1] == (math.inf, CAP.retreat * CAP.loosen, False)


def test_a_plateau_is_tried_with_a_lower_rate_which_is_taken_back() -> None:
    schedule = trusting()
    scales = [seen[1] for seen in feed(schedule, wave(5.0, 5 * CAP.window))]
    assert scales[CAP.window - 1 :: CAP.window] == [1.0, CAP.tighten, CAP.tighten, 1.0, 1.0]


def test_the_same_with_small_updates_is_no_reason() -> None:
    assert {s for _, s, _ in feed(trusting(), wave(5.0, 200), large=0.4)} == {1.0}


def test_without_a_loss_there_is_no_evidence_to_wait_for() -> None:
    schedule = trusting()
    schedule.advance(None, 1.0)
    assert not schedule.trusting
    assert schedule.ratio == CAP.first_ratio


def test_lost_weights_on_probation_end_it_and_later_ones_do_not() -> None:
    early, late, small = trusting(), trusting(), trusting()
    feed(early, wave(5.0, 3))
    feed(late, [*wave(5.0), *wave(4.0), *wave(3.0)])
    feed(small, wave(5.0, 3), large=0.0)
    for schedule in (early, late, small):
        schedule.retreat()
    assert (early.trusting, late.trusting, small.trusting) == (False, True, True)
    assert (late.lr_scale, small.lr_scale) == (CAP.retreat, 1.0)


def test_a_cap_that_binds_from_the_start() -> None:
    assert not trusting(UpdateCap()).trusting


def test_a_cap_that_stays_as_it_is_cannot_wait_for_evidence() -> None:
    with pytest.raises(ValueError, match="on_evidence must be False with adaptive=False"):
        UpdateCap(on_evidence=True, adaptive=False)


FIXED = UpdateCap(max_ratio=0.01, adaptive=False)
TIGHT = UpdateCap(max_ratio=0.01, window=10)


@pytest.mark.parametrize("before", [CAP, UpdateCap(window=10)], ids=["trusting", "strict"])
@pytest.mark.parametrize(("cap", "most"), [(FIXED, 0.01), (TIGHT, TIGHT.widest_ratio)])
def test_a_resumed_run_is_held_to_the_settings_that_it_has_now(
    before: UpdateCap, cap: UpdateCap, most: float
) -> None:
    saved, resumed = trusting(before), trusting(cap)
    feed(saved, wave(5.0, 3))
    resumed.load_state_dict(saved.state_dict())
    assert resumed.ratio <= most
    assert feed(resumed, wave(5.0, 100))[-1][0] <= most


def test_without_back_off_a_resumed_run_is_not_trusted_any_more() -> None:
    saved, resumed = trusting(), RatioSchedule(CAP)
    feed(saved, wave(5.0, 3))
    resumed.load_state_dict(saved.state_dict())
    assert resumed.ratio == CAP.first_ratio


def test_without_copies_only_what_has_shown_itself_is_trusted() -> None:
    new, proven = trusting(), trusting()
    feed(proven, [*wave(5.0), *wave(4.0), *wave(3.0)])
    for schedule in (new, proven):
        schedule.lose_copies()
    assert (new.trusting, proven.trusting) == (False, True)


# -- on the ladder --------------------------------------------------------------------------------


def observe(ladder: Ladder, step: int, loss: float, restorable: int | None = 0) -> list[Any]:
    return ladder.observe(
        step,
        total_norm=1.0,
        loss=loss,
        skipped=False,
        large_share=1.0,
        findings=[],
        restorable=restorable,
    )


def test_it_goes_back_once_without_using_up_a_rollback() -> None:
    ladder = Ladder(LadderSettings())
    actions = [a for n, loss in enumerate(EXPLODES) for a in observe(ladder, n, loss)]
    assert [a.kind for a in actions] == [ActionKind.ROLL_BACK]
    assert ladder.puts_back
    assert ladder.rollback is not None
    assert ladder.rollback.used == 0
    assert actions[0].numbers == {"to_step": 0.0, "max_ratio": UpdateCap().first_ratio}
    assert "put back to step 0, because the loss has risen" in actions[0].message
    assert ladder.plan().max_ratio == UpdateCap().first_ratio


def test_without_a_copy_the_cap_binds_from_the_first_step_on() -> None:
    ladder = Ladder(LadderSettings())
    assert observe(ladder, 0, 2.3, restorable=None) == []
    assert ladder.plan().max_ratio == UpdateCap().first_ratio


def test_a_copy_that_is_gone_later_leaves_the_cap() -> None:
    ladder = Ladder(LadderSettings())
    observe(ladder, 0, EXPLODES[0])
    actions = [a for n, loss in enumerate(EXPLODES[1:], 1) for a in observe(ladder, n, loss, None)]
    assert [a.kind for a in actions] == [ActionKind.TIGHTEN]
    assert not ladder.puts_back


@pytest.mark.parametrize("off", ["rollback", "backoff"])
def test_without_going_back_or_back_off_there_is_no_trust(off: str) -> None:
    ladder = Ladder(LadderSettings(**{off: None}))
    assert ladder.plan().max_ratio == UpdateCap().first_ratio


def test_a_lower_learning_rate_is_said_and_so_is_its_recovery() -> None:
    ladder = Ladder(LadderSettings(cap=CAP))
    actions = []
    for step, loss in enumerate(wave(5.0, 5 * CAP.window)):
        actions += observe(ladder, step, loss)
        if step == 3 * CAP.window - 1:
            assert ladder.plan().lr_scale == CAP.tighten
    assert [a.kind for a in actions] == [ActionKind.BACK_OFF, ActionKind.RECOVER]
    assert actions[0].numbers == {"lr_scale": CAP.tighten}
    assert "cut to 0.4 of its schedule, because updates are large" in actions[0].message


def test_parameters_whose_changes_compound_are_not_trusted() -> None:
    ladder = Ladder(LadderSettings(rollback=WeightRollback(), backoff=LearningRateBackoff()))
    assert math.isinf(ladder.plan().max_ratio)
    ladder.follow_parameters(EVERYTHING, compounding=True)
    assert ladder.plan().max_ratio == UpdateCap().first_ratio
