"""A loss that does not fall: when it is noted, when it is a warning, and when it is healthy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from lightning_gradguard.diagnose import (
    Finding,
    Observation,
    Pathology,
    Severity,
    StagnatingDetector,
    Thresholds,
)
from lightning_gradguard.readings import ModelFacts
from tests.diagnose.traces import (
    FLAT,
    HEALTHY,
    PHASES,
    Trace,
    diagnose,
    learned_the_mean,
    log_normal,
    noisy_plateau,
)

T = Thresholds()


def stagnation(trace: Trace, planned: int | None = None) -> list[Finding]:
    return diagnose(trace, [StagnatingDetector()], planned=planned)


def warned(findings: list[Finding]) -> int | None:
    return min((f.step for f in findings if f.severity >= Severity.WARNING), default=None)


def test_a_loss_that_lost_a_sixth_at_once_may_be_as_low_as_it_gets() -> None:
    """As that of a click-through rate or a pretrained model: flat from a tenth of the run on."""
    for seed in range(4):
        rng = random.Random(seed)
        fall = [0.69 - 0.09 * min(1.0, t / 100) + rng.gauss(0, 0.01) for t in range(1000)]
        findings = stagnation([(loss, log_normal(rng, 0.3)) for loss in fall], 1000)
        assert all(f.severity is Severity.INFO for f in findings)


def test_a_loss_that_can_be_below_zero_does_not_tell_what_is_learned() -> None:
    """A policy's loss stays near zero, however well it does."""
    rng = random.Random(0)
    trace = [(rng.gauss(0, 1), log_normal(rng, 0.3)) for _ in range(1000)]
    assert all(f.severity is Severity.INFO for f in stagnation(trace, 1000))


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_run_is_found_and_nothing_else_is_said(name: str) -> None:
    for seed in range(4):
        findings = diagnose(FLAT[name](random.Random(seed), 1000), planned=1000)
        assert {f.pathology for f in findings if f.severity >= Severity.WARNING} == {
            Pathology.STAGNATING
        }


def test_a_hinge_loss_that_is_solved_is_not_stuck_though_it_is_exactly_zero() -> None:
    for seed in range(4):
        rng = random.Random(seed)
        losses = [max(0.0, math.exp(-i / 50) - 0.1 + rng.gauss(0, 0.05)) for i in range(2000)]
        assert 0.0 in losses
        assert stagnation([(loss, 1.0) for loss in losses], 2000) == []


@pytest.mark.parametrize(
    ("planned", "patience"),
    [(300, T.stagnation_steps), (2000, 500), (None, T.stagnation_unplanned)],
    ids=["short", "planned", "unplanned"],
)
def test_patience_depends_on_the_plan(planned: int | None, patience: int) -> None:
    for seed in range(4):
        findings = stagnation(noisy_plateau(random.Random(seed), 1500), planned)
        assert [f.severity for f in findings][:2] == [Severity.INFO, Severity.WARNING]
        assert T.flat_steps - 1 <= findings[0].step < T.flat_steps + 64
        step = warned(findings)
        assert step is not None
        assert patience - 1 <= step < patience + 64


def test_the_finding_says_since_when() -> None:
    finding = stagnation(noisy_plateau(random.Random(0), 1000), 1000)[-1]
    assert finding.since is not None
    assert finding.since < 32
    assert finding.evidence["steps"] == finding.step - finding.since + 1


# A plateau of a third of the plan is more than patience can bear.
PLANNED = sorted(HEALTHY.keys() - {"plateau_then_drop"})


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("n", [300, 600, 1000, 2000])
def test_a_healthy_run_of_any_planned_length_draws_no_warning(name: str, n: int) -> None:
    phases = PHASES.get(name, lambda _: set())(n)
    for seed in range(2):
        findings = diagnose(HEALTHY[name](random.Random(seed), n), planned=n, phases=phases)
        assert [f.message for f in findings if f.severity >= Severity.WARNING] == []


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    trace = [(scale * loss, scale * norm) for loss, norm in noisy_plateau(random.Random(0), 600)]
    assert warned(stagnation(trace, 600)) == T.stagnation_steps - 1


def test_only_the_mean_is_noted_and_a_warning_when_nearly_all_of_the_run_changed_nothing() -> None:
    findings = stagnation(learned_the_mean(random.Random(0), 3000), 3000)
    noted = [f.step for f in findings if f.severity is Severity.INFO]
    step = warned(findings)
    assert step is not None
    assert min(noted) < 1200 < step
    assert "unless this is the best" in findings[-1].message


def test_a_run_that_fell_and_has_no_gradient_left_has_converged() -> None:
    rng = random.Random(0)
    for floor, found in ((1e-4, False), (0.1, True)):
        trace = [
            (0.5 + 0.7 * math.exp(-t / 10) + rng.gauss(0, 0.01), floor + math.exp(-t / 10))
            for t in range(2000)
        ]
        assert bool(stagnation(trace, 2000)) is found


@pytest.mark.parametrize("grows", [True, False])
def test_a_gradient_that_grows_defers_the_warning(grows: bool) -> None:
    """On the way off a saddle the gradient grows long before the loss moves."""
    rng = random.Random(0)
    trace = []
    for t in range(500):
        norm = math.exp(0.01 * t) if grows else 1.0
        trace.append((2.3 + rng.gauss(0, 0.02), norm * log_normal(rng, 0.2)))
    assert (warned(stagnation(trace, 500)) is None) is grows


def observe(lr: Callable[[int], float], phase: int = -1, n: int = 600) -> list[Finding]:
    detector, found = StagnatingDetector(), []
    for step, (loss, norm) in enumerate(noisy_plateau(random.Random(0), n)):
        model = ModelFacts(planned_steps=n)
        found += detector.observe(
            Observation(step, loss, norm, lr=lr(step), new_phase=step == phase, model=model)
        )
    return found


def test_no_verdict_while_the_learning_rate_warms_up() -> None:
    findings = observe(lambda step: 1e-3 * min(step + 1, 150))
    assert findings[0].step >= 150 + T.flat_steps - 16
    step = warned(findings)
    assert step is not None
    assert step >= 150 + T.stagnation_steps - 16
    assert warned(observe(lambda step: 0.1 / (step + 1))) == T.stagnation_steps - 1


def test_a_change_of_course_is_given_a_chance() -> None:
    step = warned(observe(lambda _: math.nan, phase=240))
    assert step is not None
    assert 240 + T.flat_steps - 1 <= step < 240 + T.flat_steps + 64


def test_it_heals_when_the_loss_falls_at_last() -> None:
    rng = random.Random(0)
    detector = StagnatingDetector()
    flat = noisy_plateau(rng, 400)
    assert diagnose(flat, [detector], planned=400)
    assert detector.is_open("loss")
    falls = [(2.3 * math.exp(-t / 60) + rng.gauss(0, 0.02), 1.0) for t in range(200)]
    assert diagnose(falls, [detector], planned=400) == []
    assert not detector.is_open("loss")


def test_a_loss_that_rises_is_not_flat() -> None:
    rng = random.Random(0)
    trace = [(2.3 + 0.02 * t + rng.gauss(0, 0.05), 1.0) for t in range(600)]
    assert stagnation(trace, 600) == []
