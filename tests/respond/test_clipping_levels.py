"""Thresholds follow the norms as published, and where that would latch or break, they do not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose import RobustBaseline
from lightning_gradguard.respond import AdaptiveClip, NormClip, PercentileClip, ZScoreClip
from lightning_gradguard.respond.clip_levels import ACCEPT_AFTER, ZScoreLevel, clip_target
from lightning_gradguard.respond.clip_thresholds import (
    ClipSegments,
    ClipThresholds,
    make_segments,
    make_thresholds,
)
from tests.respond.clip_twins import ZClip

NORM = st.one_of(st.floats(1e-3, 1e3), st.floats(1e-30, 1e38))
BAD = st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
STRATEGIES = [
    AdaptiveClip(multiple=3.0),
    NormClip(0.5),
    PercentileClip(30.0, window=20),
    ZScoreClip(warmup_steps=5),
]


def thresholds(strategy: Any, scope: str = "global", segments: Any = None) -> ClipThresholds:
    made = make_thresholds(type(strategy)(**{**vars(strategy), "scope": scope}), RobustBaseline())
    assert made is not None
    if segments is not None:
        made.follow(segments)
    return made


@given(
    norms=st.lists(NORM, min_size=1, max_size=40),
    percentile=st.floats(0.1, 100.0),
    window=st.integers(1, 12),
)
def test_percentiles_are_those_of_numpy(norms: list[float], percentile: float, window: int) -> None:
    learned = thresholds(PercentileClip(percentile, window=window))
    assert learned.bounds().thresholds == (math.inf,)
    for count, norm in enumerate(norms, 1):
        learned.observe([norm])
        last = norms[max(0, count - window) : count]
        assert learned.bounds().thresholds[0] == pytest.approx(
            np.percentile(last, percentile), rel=1e-9
        )


@given(norms=st.lists(st.floats(0.5, 2.0), min_size=40, max_size=120), data=st.data())
@settings(max_examples=50)
def test_z_scores_are_those_of_zclip_before_it_latches(norms: list[float], data: Any) -> None:
    for position in data.draw(st.lists(st.integers(30, len(norms) - 1), max_size=3)):
        norms[position] *= 50.0
    ours, theirs = ZScoreLevel(ZScoreClip()), ZClip()
    clipped_in_a_row = 0
    for norm in norms:
        expected = theirs.step(norm)
        clipped_in_a_row = clipped_in_a_row + 1 if expected < norm else 0
        if clipped_in_a_row >= ACCEPT_AFTER:
            return
        over = norm > ours.threshold
        found = clip_target(norm, ours.threshold, ours.center) if over else norm
        assert found == pytest.approx(expected, rel=1e-6)
        ours.observe(norm)


def test_zclip_latches_onto_a_new_level_and_ours_accepts_it() -> None:
    """A run whose norm is ten times what it was is not clipped for ever."""
    generator = np.random.default_rng(0)
    before, after = generator.uniform(0.9, 1.1, 100), generator.uniform(9.0, 11.0, 400)
    ours, theirs = ZScoreLevel(ZScoreClip()), ZClip()
    clipped: list[bool] = []
    clipped_by_zclip: list[bool] = []
    for norm in [*before, *after]:
        clipped.append(norm > ours.threshold)
        ours.observe(norm)
        clipped_by_zclip.append(theirs.step(norm) < norm)
    assert all(clipped[100 : 100 + ACCEPT_AFTER])
    assert sum(clipped[100 + ACCEPT_AFTER :]) < 20
    assert sum(clipped_by_zclip[100:]) > 300


@given(norm=NORM, center=NORM, room=st.floats(0.0, 1e3))
def test_targets_lie_between_center_and_threshold(norm: float, center: float, room: float) -> None:
    threshold = center + room
    if norm > threshold:
        target = clip_target(norm, threshold, center)
        assert center <= target <= threshold * (1 + 1e-12)
        assert clip_target(norm, threshold) == threshold


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@given(norms=st.lists(st.one_of(NORM, BAD), max_size=60))
@settings(max_examples=30)
def test_norms_that_are_not_finite_or_zero_leave_no_trace(
    strategy: Any, norms: list[float]
) -> None:
    segments = ClipSegments(("a", "b"), (0, 1))
    with_bad, without = (thresholds(strategy, "layer", segments) for _ in range(2))
    for norm in norms:
        with_bad.observe([norm, 1.0])
        if 0.0 < norm < math.inf:
            without.observe([norm, 1.0])
        else:
            without.observe([math.nan, 1.0])
        bounds = with_bad.bounds()
        assert all(t > 0.0 for t in bounds.thresholds)
        assert all(c <= t for t, c in zip(bounds.thresholds, bounds.centers, strict=True))
    assert with_bad.bounds() == without.bounds()
    assert with_bad.state_dict() == without.state_dict()


def test_the_median_of_everything_is_that_of_the_ladder() -> None:
    baseline = RobustBaseline()
    shared = make_thresholds(AdaptiveClip(multiple=3.0), baseline)
    own = thresholds(AdaptiveClip(multiple=3.0), "layer", ClipSegments(("a",), (0,)))
    assert shared is not None
    for norm in range(1, 40):
        baseline.update(math.log(norm))
        shared.observe([float(norm)])
        own.observe([float(norm)])
        assert shared.bounds() == own.bounds()
    assert len(baseline) == 39, "fed twice"
    assert shared.state_dict()["levels"] == [{}], "saved twice"


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("at", [0, 3, 17, 30])
def test_a_state_continues_exactly(strategy: Any, at: int) -> None:
    segments = ClipSegments(("a", "b"), (0, 0, 1))
    whole, part = (thresholds(strategy, "layer", segments) for _ in range(2))
    generator = np.random.default_rng(1)
    for step, norms in enumerate(generator.lognormal(size=(60, 2)) * ([1.0] * 2)):
        norms = norms * (40.0 if 20 <= step < 33 else 1.0)
        if step == at:
            state = part.state_dict()
            part = thresholds(strategy, "layer", segments)
            part.load_state_dict(state)
        for one in (whole, part):
            one.observe(norms.tolist())
        assert part.bounds() == whole.bounds()
    assert part.state_dict() == whole.state_dict()


def test_segments_with_new_members_start_afresh_and_the_others_go_on() -> None:
    learned = thresholds(PercentileClip(50.0), "layer", ClipSegments(("a", "b"), (0, 1)))
    for _ in range(3):
        learned.observe([1.0, 2.0])
    learned.follow(ClipSegments(("b", "a", "c"), (0, 1, 1, 2)))
    assert learned.bounds().thresholds == (2.0, math.inf, math.inf)
    learned.observe([1.0, 2.0])  # still of the old segments
    assert learned.bounds().thresholds == (2.0, math.inf, math.inf)


def test_a_state_of_another_strategy_or_of_other_segments_is_left_alone() -> None:
    segments = ClipSegments(("a", "b"), (0, 1))
    saved = thresholds(PercentileClip(50.0), "layer", segments)
    saved.observe([1.0, 2.0])
    state = saved.state_dict()
    for other in (ZScoreClip(warmup_steps=2), AdaptiveClip()):
        fresh = thresholds(other, "layer", segments)
        fresh.load_state_dict(state)
        assert fresh.bounds().thresholds == (math.inf, math.inf)
    grown = thresholds(PercentileClip(50.0), "layer", ClipSegments(("a", "b"), (0, 1, 1)))
    grown.load_state_dict(state)
    assert grown.bounds().thresholds == (1.0, math.inf)


def test_a_smaller_window_keeps_the_latest_norms() -> None:
    wide, narrow = (thresholds(PercentileClip(100.0, window=n)) for n in (10, 2))
    for norm in (9.0, 1.0, 2.0):
        wide.observe([norm])
    narrow.load_state_dict(wide.state_dict())
    assert narrow.bounds().thresholds == (2.0,)


def test_segments() -> None:
    names = ["a.weight", "a.bias", "b.weight", "scale"]
    assert make_segments("global", names) == ClipSegments(("",), (0, 0, 0, 0))
    by_layer = make_segments("layer", names, exclude=["b.*"])
    assert by_layer == ClipSegments(("a", "b", "scale"), (0, 0, 3, 2))
    assert (by_layer.slots, by_layer.members) == (4, {"a": 2, "b": 0, "scale": 1})
    by_group = make_segments("group", names, [1, 0, 0, 1])
    assert by_group == ClipSegments(("group 0", "group 1"), (1, 0, 0, 1))
