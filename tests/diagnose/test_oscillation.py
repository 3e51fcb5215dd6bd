"""Swings of the loss: told from noise, noted beside progress, a warning without."""

from __future__ import annotations

import math
import random

import pytest

from lightning_gradguard.diagnose import (
    Finding,
    OscillatingDetector,
    Pathology,
    Severity,
    Thresholds,
)
from tests.diagnose.traces import (
    FLAT,
    HEALTHY,
    SWINGING,
    Trace,
    diagnose,
    edge_of_stability,
    log_normal,
    thrown_about,
)

T = Thresholds()


def oscillation(trace: Trace) -> list[Finding]:
    return diagnose(trace, [OscillatingDetector()])


def warned(findings: list[Finding]) -> int | None:
    return min((f.step for f in findings if f.severity >= Severity.WARNING), default=None)


@pytest.mark.parametrize("name", SWINGING)
def test_swings_without_progress_are_a_warning(name: str) -> None:
    for seed in range(5):
        findings = diagnose(SWINGING[name](random.Random(seed), 700), planned=700)
        assert Pathology.OSCILLATING in {
            f.pathology for f in findings if f.severity >= Severity.WARNING
        }


def test_a_run_thrown_about_from_its_first_step_is_found_in_a_hundred() -> None:
    steps = [warned(oscillation(thrown_about(random.Random(seed), 400))) for seed in range(20)]
    assert all(step is not None and step < 160 for step in steps)
    assert sorted(step or 0 for step in steps)[10] == 3 * T.swing_window - 1


def test_the_finding_says_when_the_swings_began() -> None:
    for seed in range(5):
        finding = oscillation(edge_of_stability(random.Random(seed), 700))[0]
        assert finding.since is not None
        assert 180 <= finding.since < finding.step
        assert finding.evidence["spread"] > T.swing_ratio * finding.evidence["noise"]


@pytest.mark.parametrize("name", [*HEALTHY, *FLAT])
def test_noise_and_slow_waves_are_no_swings(name: str) -> None:
    make = {**HEALTHY, **FLAT}[name]
    for n in (300, 1000, 3000):
        for seed in range(2):
            findings = oscillation(make(random.Random(seed), n))
            assert warned(findings) is None
            assert len(findings) <= max(2, n / 300)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0])
def test_noise_that_was_always_there_is_silent(sigma: float) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        trace = [(2.3 * log_normal(rng, sigma), 1.0) for _ in range(2000)]
        assert warned(oscillation(trace)) is None


def test_losses_of_both_signs_alternating_at_each_step_are_noise() -> None:
    rng = random.Random(0)
    trace = [((-1.0) ** t + rng.gauss(0, 0.1), 1.0) for t in range(1000)]
    assert oscillation(trace) == []


def swinging(level: float, slope: float, seed: int = 0) -> Trace:
    rng = random.Random(seed)
    out: Trace = [(3.0 * log_normal(rng, 0.02), 1.0) for _ in range(100)]
    for t in range(600):
        loss = level - slope * t + 0.6 * math.sin(t / 4)
        out.append((loss * log_normal(rng, 0.02), 1.0))
    return out


def test_beside_progress_they_are_noted() -> None:
    """The edge of stability: the loss swings, and its level falls all the same."""
    findings = oscillation(swinging(2.5, 0.001))
    assert {f.severity for f in findings} == {Severity.INFO}
    assert "harmless" in findings[0].message


def test_without_progress_they_are_a_warning() -> None:
    assert warned(oscillation(swinging(3.0, 0.0))) is not None


def test_it_heals_when_the_swings_end() -> None:
    rng = random.Random(0)
    detector = OscillatingDetector()
    assert diagnose(swinging(3.0, 0.0), [detector])
    assert detector.is_open("loss")
    diagnose([(2.0 * 0.999**t * log_normal(rng, 0.02), 1.0) for t in range(200)], [detector])
    assert not detector.is_open("loss")


def test_a_window_across_a_change_of_course_is_not_judged() -> None:
    rng = random.Random(0)
    trace = [((1.0 if t % 128 < 64 else 2.0) * log_normal(rng, 0.02), 1.0) for t in range(64 * 9)]
    every = range(0, len(trace), 64)
    assert diagnose(trace, [OscillatingDetector()], phases=every) == []
