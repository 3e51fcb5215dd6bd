"""The ladder turns any sequence of numbers into usable bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.respond import (
    ActionKind,
    AdaptiveClip,
    LearningRateBackoff,
    SkipBadSteps,
    UpdateCap,
)
from lightning_gradguard.respond.ladder import Ladder, LadderSettings, StepPlan

SETTINGS = LadderSettings(
    AdaptiveClip(),
    UpdateCap(window=4),
    SkipBadSteps(max_consecutive=5),
    LearningRateBackoff(cooldown_steps=3, recovery_steps=3),
)
# As that of the guard, which trusts a run until its loss rises.
TRUSTING = replace(SETTINGS, cap=UpdateCap(window=4, on_evidence=True))
BOTH = st.sampled_from([SETTINGS, TRUSTING])
FLOAT = st.floats(allow_nan=True, allow_infinity=True)
NORM = st.one_of(FLOAT.map(abs), st.floats(0.1, 10.0), st.floats(1e300, 1e308), st.just(0.0))


def finding(pathology: Pathology, severity: Severity = Severity.WARNING) -> Finding:
    return Finding(pathology, severity, "layer", 0, {}, "words")


FINDINGS = st.lists(
    st.builds(finding, st.sampled_from(list(Pathology)), st.sampled_from(list(Severity))),
    max_size=2,
)
STEP = st.fixed_dictionaries(
    {
        "total_norm": NORM,
        "loss": st.one_of(st.none(), FLOAT),
        "large_share": st.floats(0.0, 1.0),
        "findings": FINDINGS,
    }
)
# Runs of one and the same step, so that medians, budgets and cooldowns are reached.
STEPS = st.lists(st.tuples(STEP, st.integers(1, 20)), max_size=12).map(
    lambda runs: [step for step, times in runs for _ in range(times)]
)


def feed(
    ladder: Ladder,
    steps: list[dict[str, Any]],
    first: int = 0,
    restorable: int | None = None,
) -> list[Any]:
    """Plans and actions; a step is dropped when its plan says so."""
    seen = []
    for number, step in enumerate(steps, first):
        plan = ladder.plan()
        skipped = plan.skips(step["total_norm"])
        actions = ladder.observe(number, skipped=skipped, restorable=restorable, **step)
        seen.append((plan, [a.to_dict() for a in actions]))
    return seen


@given(steps=STEPS, chosen=BOTH)
def test_it_takes_anything_and_its_bounds_are_usable(
    steps: list[dict[str, Any]], chosen: LadderSettings
) -> None:
    for plan, actions in feed(Ladder(chosen), steps, restorable=0):
        assert plan.clip_threshold > 0.0
        assert plan.skip_limit >= plan.clip_threshold
        assert plan.max_ratio > 0.0
        assert plan.max_ratio < math.inf or chosen is TRUSTING
        assert 0.0 < plan.lr_scale <= 1.0
        assert plan.may_skip
        assert all(action["message"] for action in actions)


@given(steps=STEPS, chosen=BOTH, restorable=st.sampled_from([None, 0]))
@settings(max_examples=20)
def test_it_decides_from_nothing_else(
    steps: list[dict[str, Any]], chosen: LadderSettings, restorable: int | None
) -> None:
    first, second = (feed(Ladder(chosen), steps, restorable=restorable) for _ in range(2))
    assert repr(first) == repr(second)


@given(steps=STEPS, at=st.integers(0, 100), chosen=BOTH, restorable=st.sampled_from([None, 0]))
@settings(max_examples=20)
def test_state_round_trip(
    steps: list[dict[str, Any]], at: int, chosen: LadderSettings, restorable: int | None
) -> None:
    first, second = Ladder(chosen), Ladder(chosen)
    seen = feed(first, steps[:at], restorable=restorable)
    assume(not first.should_stop)
    second.load_state_dict(first.state_dict())
    seen += feed(second, steps[at:], first=at, restorable=restorable)
    assert repr(seen) == repr(feed(Ladder(chosen), steps, restorable=restorable))


def test_a_stopped_run_that_is_resumed_has_its_budget_again() -> None:
    bad = {"total_norm": math.nan, "loss": None, "large_share": 0.0, "findings": []}
    stopped, resumed = Ladder(SETTINGS), Ladder(SETTINGS)
    feed(stopped, [bad] * 60)
    assert stopped.should_stop
    resumed.load_state_dict(stopped.state_dict())
    assert not resumed.should_stop
    feed(resumed, [bad])
    assert not resumed.should_stop


@given(steps=STEPS)
def test_it_asks_to_stop_once_and_only_after_the_budget(steps: list[dict[str, Any]]) -> None:
    ladder = Ladder(SETTINGS)
    in_a_row, stops = 0, 0
    for plan, actions in feed(ladder, steps):
        kinds = [action["kind"] for action in actions]
        in_a_row = in_a_row + 1 if "skip" in kinds else 0
        if "stop" in kinds:
            assert stops == 0
            assert in_a_row == SETTINGS.skip.max_consecutive
            stops += 1
        assert plan.may_skip
    assert ladder.should_stop == bool(stops)


def test_the_budget_is_spent_on_a_run_that_stays_bad() -> None:
    ladder = Ladder(SETTINGS)
    step = {"total_norm": math.nan, "loss": None, "large_share": 0.0, "findings": []}
    kinds = [a["kind"] for _, actions in feed(ladder, [step] * 20) for a in actions]
    assert kinds == ["skip"] * 5 + ["stop"] + ["skip"] * 15


@given(steps=STEPS)
@settings(max_examples=20)
def test_without_rungs_nothing_is_bounded_and_nothing_done(steps: list[dict[str, Any]]) -> None:
    for plan, actions in feed(Ladder(LadderSettings(None, None, None, None, None)), steps):
        assert plan == StepPlan()
        assert actions == []


@given(norm=NORM)
def test_a_plan_that_may_not_skip_never_skips(norm: float) -> None:
    assert not StepPlan(skip_limit=0.0).skips(norm)


@pytest.mark.parametrize("pathology", list(Pathology))
@pytest.mark.parametrize("severity", list(Severity))
def test_only_a_run_that_gets_worse_has_its_rate_cut(
    pathology: Pathology, severity: Severity
) -> None:
    ladder = Ladder(SETTINGS)
    step = {"total_norm": 1.0, "loss": 1.0, "large_share": 0.0}
    actions = ladder.observe(0, skipped=False, findings=[finding(pathology, severity)], **step)
    # A smaller rate helps against no NaN, no gradient that vanishes and no layer that is dead.
    helped = pathology in (Pathology.DIVERGING, Pathology.EXPLODING, Pathology.LOSS_SPIKE)
    cut = helped and severity is not Severity.INFO
    assert [a.kind for a in actions] == ([ActionKind.BACK_OFF] if cut else [])
    assert ladder.plan().lr_scale == (SETTINGS.backoff.factor if cut else 1.0)


@given(norms=st.lists(st.floats(0.5, 2.0), min_size=40, max_size=80), power=st.integers(-30, 30))
@settings(max_examples=20)
def test_bounds_follow_the_unit_of_the_gradient(norms: list[float], power: int) -> None:
    plans = []
    for unit in (1.0, 2.0**power):
        ladder = Ladder(LadderSettings(cap=None, backoff=None))
        steps = [
            {"total_norm": n * unit, "loss": None, "large_share": 0.0, "findings": []}
            for n in norms
        ]
        feed(ladder, steps)
        plan = ladder.plan()
        assert math.isfinite(plan.clip_threshold)
        assert math.isfinite(plan.skip_limit)
        plans.append((plan.clip_threshold / unit, plan.skip_limit / unit))
    assert plans[1] == pytest.approx(plans[0])
