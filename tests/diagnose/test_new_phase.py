"""What happens where a run changes course: levels are learned anew, evidence is kept."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose import (
    DivergingDetector,
    ExplodingDetector,
    Finding,
    LossSpikeDetector,
    Observation,
    RobustBaseline,
    Severity,
    Thresholds,
)
from tests.diagnose.traces import HEALTHY, PHASES, Trace, diagnose, explosion, log_normal

T = Thresholds()
# Each example is a whole run.
few = settings(max_examples=30)
SEEDS = st.integers(0, 10_000)


def new_level(factor: float, seed: int, loss: float = 1.0) -> Trace:
    rng = random.Random(seed)
    return [
        (loss * log_normal(rng, 0.03), (factor if t >= 200 else 1.0) * log_normal(rng, 0.3))
        for t in range(500)
    ]


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.floats(-1e6, 1e6))
def test_a_baseline_that_relearns_is_not_ready_until_warmed_up(
    values: list[float], level: float
) -> None:
    baseline = RobustBaseline()
    for value in values:
        baseline.update(value)
    baseline.relearn()
    assert baseline.state_dict() == RobustBaseline().state_dict()
    for entered in range(baseline.warmup):
        assert not baseline.ready
        assert len(baseline) == entered
        assert baseline.update(level) == 0.0
    assert baseline.ready


@few
@given(exponent=st.floats(-3, 3), seed=SEEDS)
def test_a_new_level_of_the_gradient_with_a_change_of_course_says_nothing(
    exponent: float, seed: int
) -> None:
    trace = new_level(10.0**exponent, seed)
    findings = diagnose(trace, [ExplodingDetector()], phases={200})
    # A baseline of few values has outliers by chance; what counts is the change itself.
    assert [f for f in findings if 200 <= f.step < 200 + T.warmup] == []
    assert all(f.severity is Severity.INFO for f in findings)


@few
@given(exponent=st.floats(-3, 2.9), seed=SEEDS)
def test_without_one_a_new_level_is_accepted_after_a_while(exponent: float, seed: int) -> None:
    detector = ExplodingDetector()
    findings = diagnose(new_level(10.0**exponent, seed), [detector])
    assert all(f.severity is Severity.INFO for f in findings)
    assert all(f.step <= 200 + T.accept_after for f in findings)
    assert not detector.is_open("model")


def test_an_explosion_after_a_change_of_course_is_found() -> None:
    trace = explosion(random.Random(0), 400, 0.2)
    findings = diagnose(trace, [ExplodingDetector()], phases={400})
    assert any(f.severity is Severity.WARNING and f.step < 450 for f in findings)


def test_an_explosion_that_began_before_it_stays_open() -> None:
    rng = random.Random(0)
    detector = ExplodingDetector()
    usual: Trace = [(1.0, log_normal(rng, 0.2)) for _ in range(200)]
    diagnose([*usual, *[(5.0, 100.0)] * 10], [detector])
    assert detector.is_open("model")
    detector.observe(Observation(210, 5.0, 100.0, new_phase=True))
    assert detector.is_open("model")


def spikes(height: float, *, told: bool) -> list[Finding]:
    rng = random.Random(0)
    trace = [((height if t >= 200 else 0.5) * log_normal(rng, 0.05), 1.0) for t in range(400)]
    return diagnose(trace, [LossSpikeDetector()], phases={200} if told else ())


def test_a_jump_of_the_loss_is_a_spike_only_without_a_change_of_course() -> None:
    assert [f.step for f in spikes(1.5, told=False)][:1] == [200]
    assert spikes(1.5, told=True) == []


def restart(height: float) -> Trace:
    """A loss that has fallen to 0.1, and a restart that lifts it and comes down in 100 steps."""
    rng = random.Random(0)
    out: Trace = [
        ((0.1 + 2.2 * math.exp(-t / 50)) * log_normal(rng, 0.05), 1.0) for t in range(400)
    ]
    for t in range(400):
        rise = height * min(1.0, t / 20) * math.exp(-max(0, t - 20) / 100)
        out.append(((0.1 + rise) * log_normal(rng, 0.05), 1.0))
    return out


def test_a_warm_restart_is_no_divergence() -> None:
    warned = [
        f for f in diagnose(restart(1.4), [DivergingDetector()]) if f.severity > Severity.INFO
    ]
    assert warned
    assert diagnose(restart(1.4), [DivergingDetector()], phases={400}) == []


def test_a_restart_that_throws_the_run_back_to_worse_than_its_start_is() -> None:
    findings = diagnose(restart(10.0), [DivergingDetector()], phases={400})
    assert any(f.severity >= Severity.WARNING for f in findings)


def test_a_slow_divergence_after_a_change_of_course_is_found() -> None:
    rng = random.Random(0)
    out: Trace = [
        ((0.1 + 2.2 * math.exp(-t / 50)) * log_normal(rng, 0.05), 1.0) for t in range(400)
    ]
    out += [(0.1 + 0.005 * t + rng.gauss(0, 0.02), 1.0) for t in range(500)]
    findings = diagnose(out, [DivergingDetector()], phases={400})
    assert any(f.severity >= Severity.WARNING for f in findings)


@pytest.mark.parametrize("name", PHASES)
def test_a_healthy_run_of_several_phases_draws_nothing_at_all(name: str) -> None:
    for seed in range(3):
        trace = HEALTHY[name](random.Random(seed), 2000)
        assert diagnose(trace, planned=2000, phases=PHASES[name](2000)) == []
        assert diagnose(trace, planned=2000) != []
