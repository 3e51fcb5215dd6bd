"""What the course of a loss says, and what it never does."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.respond.loss_course import improved, overshoots, rises

# Halves of whole numbers: sums and differences are exact, and so are products with powers of two.
LOSSES = st.lists(st.integers(-200, 200).map(lambda n: n / 2), min_size=1, max_size=60)
QUESTIONS = [overshoots, rises]
LEVEL = [2.3, 2.4, 2.3, 2.2, 2.4, 2.3, 2.2]


@pytest.mark.parametrize("asked", QUESTIONS)
@given(losses=LOSSES, power=st.integers(-20, 20))
def test_scaling_the_loss_changes_nothing(asked, losses: list[float], power: int) -> None:
    assert asked([loss * 2.0**power for loss in losses]) == asked(losses)


@given(losses=LOSSES, shift=st.integers(-1000, 1000))
def test_shifting_it_does_not_change_whether_it_rises(losses: list[float], shift: int) -> None:
    assert rises([loss + shift for loss in losses]) == rises(losses)


@pytest.mark.parametrize("asked", QUESTIONS)
@given(losses=LOSSES)
def test_a_loss_that_never_rises_says_nothing(asked, losses: list[float]) -> None:
    assert not asked(sorted(losses, reverse=True))


@pytest.mark.parametrize("bad", [math.inf, 1e6])
@pytest.mark.parametrize("asked", QUESTIONS)
@given(at=st.integers(1, 9))
def test_nor_does_a_single_bad_batch(asked, bad: float, at: int) -> None:
    losses = [2.3, 2.35, 2.28, 2.31, 2.33, 2.29, 2.3, 2.34, 2.27, 2.31]
    losses[at] = bad
    assert not any(asked(losses[:count]) for count in range(1, 11))


@pytest.mark.parametrize("bad", [(1e6, 1e6), (1e6, math.inf), (math.inf, 1e6)])
def test_two_in_a_row_do(bad: tuple[float, float]) -> None:
    assert overshoots([*LEVEL, *bad])


def test_but_not_two_batches_with_nan() -> None:
    """Their steps were dropped, and nothing has come of them."""
    assert not overshoots([*LEVEL, math.inf, math.inf])
    assert not overshoots([*LEVEL, math.inf, math.inf, *LEVEL[:3]])
    assert overshoots([*LEVEL, math.inf, math.inf, math.inf])


def test_it_overshoots_by_a_little_if_three_of_five_losses_do() -> None:
    assert not overshoots([2.3, 2.5, 2.5, 2.5, 2.5])
    assert overshoots([2.3, 2.5, 2.2, 2.5, 2.2, 2.5])
    assert not overshoots([2.3, *[2.4] * 5])  # 4 %


def test_a_loss_below_zero_overshoots_by_a_leap() -> None:
    falls = [-1.0, -1.2, -1.1, -1.3, -1.2, -1.4]
    assert not overshoots([*falls, -0.6, -0.7])
    assert not overshoots([*falls[:3], 90.0, 90.0])
    assert overshoots([*falls, 90.0, 90.0])


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_around_zero_is_no_evidence(seed: int) -> None:
    rng = random.Random(seed)
    losses = [rng.gauss(0.0, 1.0) for _ in range(50)]
    early = any(overshoots(losses[:n]) for n in range(2, 8))
    assert not any(overshoots(losses[:n]) for n in range(8, 51))
    assert not early or min(losses[:4]) > 0.0


def test_it_rises_from_the_lowest_it_has_been_at() -> None:
    falling = [3.0 - 0.1 * (step // 2) + 0.05 * (step % 2) for step in range(20)]
    assert not rises(falling)
    assert rises([*falling, 2.6, 2.65, 2.6, 2.65, 2.6])
    assert not rises([*falling, 2.15, 2.2, 2.15, 2.2, 2.15])  # within the noise


def test_it_rises_when_it_is_no_longer_finite() -> None:
    assert rises([2.3, 2.4, 2.3, 2.4, 2.3, math.inf, math.inf, math.inf, 2.4, 2.3])


def test_a_loss_that_was_never_finite_has_not_risen() -> None:
    assert not rises([math.inf] * 20)


def test_infinite_before_and_finite_now_is_better() -> None:
    assert improved([math.inf] * 4, [5.0] * 4, confidence=2.0)
    assert not improved([5.0] * 4, [math.inf] * 4, confidence=2.0)
