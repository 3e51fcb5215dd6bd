"""What the schedule of the cap never does, whatever its rule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.respond import UpdateCap
from lightning_gradguard.respond.ratio_schedule import RatioSchedule

CAP = UpdateCap(window=4, max_ratio=0.1, wide_ratio=0.1)
LOSS = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(-10, 10))
STEPS = st.lists(st.tuples(LOSS, st.floats(0.0, 1.0)), max_size=120)
# Halves of whole numbers: sums and differences are exact, and so are products with powers of two.
EXACT = st.lists(
    st.tuples(st.integers(-200, 200).map(lambda n: n / 2), st.floats(0.0, 1.0)), max_size=120
)


def ratios(steps: list[Any], cap: UpdateCap = CAP) -> list[float]:
    schedule = RatioSchedule(cap)
    result = []
    for loss, share in steps:
        before = schedule.ratio
        change = schedule.advance(loss, share)
        assert change == schedule.ratio / before
        result.append(schedule.ratio)
    return result


@given(steps=STEPS)
def test_it_stays_within_its_bounds(steps: list[Any]) -> None:
    assert all(CAP.least_ratio <= ratio <= CAP.max_ratio for ratio in ratios(steps))


@given(steps=STEPS)
def test_it_never_tightens_while_nothing_binds(steps: list[Any]) -> None:
    schedule = RatioSchedule(CAP)
    for loss, _ in steps:
        assert schedule.advance(loss, 0.0) >= 1.0


@given(steps=EXACT, power=st.integers(-20, 20))
def test_scaling_the_loss_changes_nothing(steps: list[Any], power: int) -> None:
    assert ratios([(loss * 2.0**power, share) for loss, share in steps]) == ratios(steps)


@given(steps=EXACT, shift=st.integers(-1000, 1000))
def test_shifting_the_loss_changes_nothing(steps: list[Any], shift: int) -> None:
    assert ratios([(loss + shift, share) for loss, share in steps]) == ratios(steps)


@given(steps=STEPS)
def test_a_cap_that_does_not_adapt(steps: list[Any]) -> None:
    assert set(ratios(steps, replace(CAP, adaptive=False))) <= {CAP.max_ratio}


@given(steps=STEPS)
def test_unknown_losses_change_nothing(steps: list[Any]) -> None:
    known = [(loss, share) for loss, share in steps if loss is not None]
    assert ratios(known) == [
        r for r, s in zip(ratios(steps), steps, strict=True) if s[0] is not None
    ]


@given(steps=STEPS, at=st.integers(0, 120))
@settings(max_examples=20)
def test_state_round_trip(steps: list[Any], at: int) -> None:
    schedule, expected = RatioSchedule(CAP), ratios(steps)
    for number, (loss, share) in enumerate(steps):
        if number == at:
            state = schedule.state_dict()
            schedule = RatioSchedule(CAP)
            schedule.load_state_dict(state)
        schedule.advance(loss, share)
        assert schedule.ratio == expected[number]


def test_a_loss_that_gets_worse_under_a_cap_that_binds_tightens_it_to_the_end() -> None:
    result = ratios([(float(step), 1.0) for step in range(400)])
    assert result[-1] == CAP.least_ratio
    assert result == sorted(result, reverse=True)


def test_so_does_a_loss_that_is_not_finite() -> None:
    for loss in (math.nan, math.inf):
        assert ratios([(loss, 1.0)] * 400)[-1] == CAP.least_ratio


def test_a_loss_that_falls_loosens_it_to_the_end() -> None:
    result = ratios([(-float(step), 1.0) for step in range(400)])
    assert result[-1] == CAP.max_ratio
    assert result == sorted(result)
    assert result[0] == CAP.first_ratio


def window(loss: float, spread: float = 0.1) -> list[tuple[float, float]]:
    """Losses of one window around ``loss``, with large updates."""
    return [(loss + spread * (step % 2), 1.0) for step in range(CAP.window)]


def test_it_opens_fast_until_it_is_tightened_for_the_first_time() -> None:
    cap = replace(CAP, max_ratio=10.0, wide_ratio=10.0, start_ratio=0.1)
    falling = [step for loss in (9.0, 8.0, 7.0) for step in window(loss)]
    assert ratios(falling, cap)[-1] == 0.1 * cap.opening**2
    worse, falls_again = window(8.0), window(6.0)
    result = ratios([*falling, *worse, *falls_again], cap)
    assert math.isclose(result[-1], 0.1 * cap.opening**2 * cap.retreat * cap.loosen)


def test_it_retreats_from_a_loss_that_gets_worse() -> None:
    assert ratios([*window(5.0), *window(9.0)])[-1] == CAP.first_ratio * CAP.retreat


def test_it_tries_smaller_updates_on_a_plateau_and_keeps_what_helps() -> None:
    tried = [*window(5.0), *window(5.0)]
    assert ratios(tried)[-1] == CAP.first_ratio * CAP.tighten
    helped = ratios([*tried, *window(4.0)])
    assert helped[-1] == CAP.first_ratio * CAP.tighten
    assert ratios([*tried, *window(4.0), *window(3.0)])[-1] == helped[-1] * CAP.loosen


def test_what_does_not_help_is_taken_back_and_tried_again_ever_more_rarely() -> None:
    cap = replace(CAP, window=40, start_ratio=CAP.max_ratio)  # too long a window to grow
    flat = [(5.0 + 0.1 * (step % 2), 1.0) for step in range(15 * cap.window)]
    by_window = ratios(flat, cap)[cap.window - 1 :: cap.window]
    tight = [n for n, ratio in enumerate(by_window) if ratio < cap.max_ratio]
    assert tight == [1, 2, 5, 6, 11, 12]  # two windows of trial; one, two, four, ... of patience


def test_a_plateau_after_a_retreat_is_left_at_the_widest_share() -> None:
    assert ratios([*window(5.0), *window(9.0) * 100])[-1] == CAP.max_ratio


def test_after_a_rollback_it_is_tightened_and_compares_later_losses_only() -> None:
    schedule = RatioSchedule(CAP)
    for loss, share in window(5.0):
        schedule.advance(loss, share)
    schedule.retreat()
    assert schedule.ratio == CAP.first_ratio * CAP.retreat
    for loss, share in window(9.0):  # what was before is forgotten
        assert schedule.advance(loss, share) == 1.0
