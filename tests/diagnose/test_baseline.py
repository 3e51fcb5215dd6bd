from __future__ import annotations

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnose import RobustBaseline, log_norm

VALUES = st.lists(st.floats(-1e6, 1e6), max_size=200)
SMALL = {"window": 16, "warmup": 4, "accept_after": 4}


def filled(values: list[float], **options: float) -> RobustBaseline:
    baseline = RobustBaseline(**{**SMALL, **options})  # type: ignore[arg-type]
    for value in values:
        baseline.update(value)
    return baseline


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_median_and_scale_equal_those_of_sorting_the_window(values: list[float]) -> None:
    baseline = filled(values, outlier_z=1e12, scale_floor=1e-3)
    window = values[-16:] if len(values) >= 4 else values
    center = statistics.median(window)
    mad = statistics.median(abs(v - center) for v in window)
    assert baseline.median == pytest.approx(center, rel=1e-12, abs=1e-9)
    assert baseline.scale == pytest.approx(max(1.4826 * mad, 1e-3), rel=1e-9, abs=1e-9)


def test_score_is_taken_before_the_value_enters() -> None:
    baseline = filled([0.0, 1.0, 2.0, 3.0, 4.0])
    expected = (3.5 - 2.0) / 1.4826
    assert baseline.score(3.5) == pytest.approx(expected)
    assert baseline.update(3.5) == pytest.approx(expected)
    assert baseline.median == 2.5


def test_not_ready_until_warmed_up() -> None:
    baseline = filled([1.0, 1.0, 1.0])
    assert not baseline.ready
    assert baseline.score(100.0) == 0.0
    assert baseline.threshold(6.0) == math.inf
    assert baseline.update(100.0) == 0.0
    assert baseline.ready


@pytest.mark.parametrize(
    ("value", "z"), [(math.nan, math.inf), (math.inf, math.inf), (-math.inf, -math.inf)]
)
def test_non_finite_values_never_enter(value: float, z: float) -> None:
    baseline = filled([0.0, 1.0, 2.0, 3.0, 4.0])
    before = baseline.state_dict()
    assert baseline.update(value) == z
    assert baseline.state_dict() == before
    assert RobustBaseline().update(value) == z


def test_an_outlier_enters_capped() -> None:
    baseline = filled([0.0, 1.0, 2.0, 3.0, 4.0])
    bound = baseline.threshold(6.0)
    assert baseline.update(1e9) > 6.0
    assert baseline.highest == bound
    assert baseline.median == 2.5


def test_a_sustained_level_is_accepted_after_accept_after_outliers() -> None:
    baseline = filled([0.0] * 16, accept_after=5)
    scores = [baseline.update(10.0 + 0.01 * i) for i in range(8)]
    assert [z > 6.0 for z in scores] == [True] * 5 + [False] * 3
    assert len(baseline) == 8
    assert baseline.median == pytest.approx(10.035)


def test_a_fall_is_accepted_too() -> None:
    baseline = filled([0.0] * 16)
    scores = [baseline.update(-10.0) for _ in range(5)]
    assert [z < -6.0 for z in scores] == [True] * 4 + [False]


@pytest.mark.parametrize("interruption", [0.0, -10.0], ids=["usual value", "other side"])
def test_outliers_that_are_not_consecutive_are_not_a_level(interruption: float) -> None:
    baseline = filled([0.0] * 16)
    for value in (10.0, 10.0, 10.0, interruption, 10.0, 10.0, 10.0):
        baseline.update(value)
    assert baseline.median == 0.0


def test_any_level_shift_is_accepted_in_bounded_time() -> None:
    """What ZClip, which feeds back its clipped values, does not do."""
    rng = random.Random(0)
    for height in (0.5, 1.0, 2.0, 5.0, 50.0):
        baseline = RobustBaseline()
        for _ in range(300):
            baseline.update(rng.gauss(0.0, 0.2))
        for _ in range(128):
            baseline.update(height + rng.gauss(0.0, 0.2))
        fired = sum(baseline.update(height + rng.gauss(0.0, 0.2)) > 6.0 for _ in range(1000))
        assert fired == 0
        assert baseline.median == pytest.approx(height, abs=0.1)


def test_a_scale_of_zero_gives_infinite_scores_without_failing() -> None:
    baseline = filled([0.0] * 6, scale_floor=0.0)
    assert baseline.scale == 0.0
    assert baseline.score(0.0) == 0.0
    assert baseline.score(1e-300) == math.inf
    assert baseline.score(-1e-300) == -math.inf
    assert baseline.update(1.0) == math.inf
    assert baseline.highest == 0.0


@pytest.mark.parametrize(("level", "scale"), [(100.0, 1.0), (-100.0, 1e-4)])
def test_the_relative_floor_needs_a_natural_zero(level: float, scale: float) -> None:
    baseline = filled([level] * 6, scale_floor=0.0, relative_floor=0.01)
    assert baseline.scale == pytest.approx(scale)


@given(VALUES, VALUES)
def test_continues_bit_for_bit_after_a_restore(before: list[float], after: list[float]) -> None:
    original = filled(before)
    restored = RobustBaseline(**SMALL)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    for value in after:
        assert original.update(value) == restored.update(value)
        assert (original.median, original.scale) == (restored.median, restored.scale)
    assert original.state_dict() == restored.state_dict()


def test_state_of_a_longer_window_is_refused() -> None:
    state = filled([0.0] * 16).state_dict()
    with pytest.raises(ValueError, match=r"16 values, the window allows at most 8"):
        RobustBaseline(window=8, warmup=4, accept_after=4).load_state_dict(state)


def test_reset_forgets_everything() -> None:
    baseline = filled([0.0] * 16 + [10.0] * 2)
    baseline.reset()
    assert baseline.state_dict() == RobustBaseline().state_dict()
    assert not baseline.ready
    assert math.isnan(baseline.median)
    assert math.isnan(baseline.highest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be an integer >= 2, got 1"),
        ({"warmup": 129}, "warmup must be an integer >= 2 and <= 128, got 129"),
        ({"accept_after": 1}, "accept_after must be an integer >= 2 and <= 128, got 1"),
        ({"outlier_z": 0.0}, "outlier_z must be a number > 0 and < inf, got 0.0"),
        ({"scale_floor": -1.0}, "scale_floor must be a number >= 0 and < inf, got -1.0"),
        ({"relative_floor": math.nan}, "relative_floor must be a number >= 0 and < inf, got nan"),
    ],
)
def test_bad_arguments(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustBaseline(**options)  # type: ignore[arg-type]


@given(st.floats(min_value=0.0) | st.just(math.nan))
def test_log_norm_never_raises(norm: float) -> None:
    value = log_norm(norm)
    if math.isfinite(norm) and norm > 0:
        assert value == math.log(norm)
    else:
        assert value == (-math.inf if norm == 0 else math.inf)
