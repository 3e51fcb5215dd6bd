"""Whole runs: healthy ones draw no warning, failing ones are found in time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from lightning_gradguard.diagnose import (
    DivergingDetector,
    ExplodingDetector,
    Finding,
    NonFiniteDetector,
    Observation,
    Pathology,
    Severity,
    Thresholds,
    default_detectors,
)
from tests.diagnose.traces import (
    HEALTHY,
    PHASES,
    Make,
    Trace,
    diagnose,
    explosion,
    falling,
    lasting_spike,
    slow_divergence,
)

UnsureTrace = list[tuple[float | None, float]]

STEPS = 3000
SEEDS = range(3)


def first(findings: list[Finding], pathology: Pathology, least: Severity) -> int | None:
    steps = [f.step for f in findings if f.pathology is pathology and f.severity >= least]
    return min(steps, default=None)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_draws_no_warning(name: str) -> None:
    make: Make = HEALTHY[name]
    phases = PHASES.get(name, lambda _: set())(STEPS)
    for seed in SEEDS:
        findings = diagnose(make(random.Random(seed), STEPS), phases=phases)
        assert [f.message for f in findings if f.severity >= Severity.WARNING] == []
        # Nor does it drown its user in notes.
        assert len(findings) <= STEPS / 50


@pytest.mark.parametrize(
    "kind", ["outlier_batches", "warm_restarts"], ids=["one bad batch", "restart"]
)
def test_a_symptom_alone_is_noted(kind: str) -> None:
    findings = diagnose(HEALTHY[kind](random.Random(0), STEPS))
    assert Pathology.LOSS_SPIKE in {f.pathology for f in findings}


# Kind of run, the pathology that names it, and the steps within which it must be a warning.
FAILING: dict[str, tuple[Callable[[random.Random], Trace], str, int, int]] = {
    "explosion, e-fold in 20 steps": (lambda r: explosion(r, 400, 0.05), "DIVERGING", 400, 130),
    "explosion, e-fold in 10 steps": (lambda r: explosion(r, 400, 0.1), "EXPLODING", 400, 45),
    "explosion, e-fold in 5 steps": (lambda r: explosion(r, 400, 0.2), "EXPLODING", 400, 25),
    "explosion, e-fold in a step": (lambda r: explosion(r, 400, 1.0), "EXPLODING", 400, 10),
    "explosion, 7-fold in a step": (lambda r: explosion(r, 400, 2.0), "EXPLODING", 400, 8),
    "from the first step, 0.2": (lambda r: explosion(r, 0, 0.2), "EXPLODING", 0, 50),
    "from the first step, 0.5": (lambda r: explosion(r, 0, 0.5), "EXPLODING", 0, 25),
    "from the first step, 1.0": (lambda r: explosion(r, 0, 1.0), "EXPLODING", 0, 13),
    "from the first step, 2.0": (lambda r: explosion(r, 0, 2.0), "EXPLODING", 0, 10),
    "spike that stays, 2.0": (lambda r: lasting_spike(r, 400, 2.0), "LOSS_SPIKE", 400, 24),
    "spike that stays, 50.0": (lambda r: lasting_spike(r, 400, 50.0), "LOSS_SPIKE", 400, 24),
    "divergence, 0.02 a step": (lambda r: slow_divergence(r, 400, 0.02), "DIVERGING", 400, 140),
    "divergence, 0.005 a step": (lambda r: slow_divergence(r, 400, 0.005), "DIVERGING", 400, 280),
    "divergence, 0.001 a step": (
        lambda r: slow_divergence(r, 400, 0.001),
        "DIVERGING",
        400,
        1100,
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_run_is_found_in_time(name: str) -> None:
    make, pathology, start, within = FAILING[name]
    delays = []
    for seed in SEEDS:
        findings = diagnose(make(random.Random(seed)))
        step = first(findings, Pathology[pathology], Severity.WARNING)
        assert step is not None, [f.message for f in findings]
        assert all(f.step >= start for f in findings if f.severity >= Severity.WARNING)
        delays.append(step - start)
    print(f"{name}: {pathology} found after {delays} steps, allowed {within}")
    assert max(delays) <= within


def test_a_negative_loss_is_diagnosed_like_its_positive_twin() -> None:
    for make in (explosion, lasting_spike, slow_divergence):
        trace = make(random.Random(0), 400)
        below = [(loss - 1e5, norm) for loss, norm in trace]
        found = {f.pathology for f in diagnose(trace) if f.severity >= Severity.WARNING}
        found_below = {f.pathology for f in diagnose(below) if f.severity >= Severity.WARNING}
        assert found
        assert found_below >= found


def test_a_divergence_that_lasts_is_critical() -> None:
    findings = diagnose(slow_divergence(random.Random(0), 400, 0.02))
    severities = [f.severity for f in findings if f.pathology is Pathology.DIVERGING]
    assert severities[-2:] == [Severity.WARNING, Severity.CRITICAL]


# ---- non-finite ---------------------------------------------------------------------------------

NORMS = {"embed.weight": 1.0, "rnn.weight_hh_l0": math.inf, "rnn.bias": 1.0, "head.bias": math.nan}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_module_where_a_non_finite_gradient_began_is_named_at_once(bad: float) -> None:
    healthy = falling(random.Random(0), 300)
    detectors = default_detectors()
    assert diagnose(healthy, detectors) == []
    found = [f for d in detectors for f in d.observe(Observation(300, 0.1, bad, NORMS))]
    assert [(f.pathology, f.severity, f.where, f.step) for f in found] == [
        (Pathology.NON_FINITE, Severity.CRITICAL, "head", 300)
    ]
    assert found[0].evidence["non_finite_parameters"] == 2.0
    assert "2 of 4 parameters" in found[0].message


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_alone_is_the_loss(loss: float) -> None:
    (finding,) = diagnose([(loss, 1.0)])
    assert (finding.where, finding.severity) == ("loss", Severity.CRITICAL)


def test_without_norms_the_model_is_named() -> None:
    (finding,) = diagnose([(None, math.nan)])
    assert finding.where == "model"


def test_a_non_finite_loss_and_gradient_name_the_model_and_the_loss() -> None:
    (finding,) = NonFiniteDetector().observe(Observation(0, math.nan, math.nan, NORMS))
    assert finding.where == "model"
    assert "loss" in finding.message


def test_said_once_and_again_only_after_it_healed() -> None:
    heal = Thresholds().heal_steps
    good, bad = [(1.0, 1.0)], [(math.nan, math.nan)]
    trace = bad * 50 + good * (heal - 1) + bad + good * heal + bad
    assert [f.step for f in diagnose(trace, [NonFiniteDetector()])] == [0, len(trace) - 1]


# ---- exploding ----------------------------------------------------------------------------------


def jump(factor: float, losses: list[float | None], quiet: int = 200) -> UnsureTrace:
    rng = random.Random(1)
    before: Trace = [(1.0 + rng.gauss(0, 0.05), math.exp(rng.gauss(0, 0.2))) for _ in range(quiet)]
    after: UnsureTrace = [(loss, factor * math.exp(rng.gauss(0, 0.2))) for loss in losses]
    return [*before, *after]


def test_a_symptom_alone_is_info() -> None:
    findings = diagnose(jump(100.0, [1.0] * 100), [ExplodingDetector()])
    assert [f.severity for f in findings] == [Severity.INFO]
    assert findings[0].step == 200
    assert findings[0].evidence["ratio"] == pytest.approx(100.0, rel=0.7)


def test_with_a_worse_loss_it_is_a_warning() -> None:
    findings = diagnose(jump(100.0, [5.0] * 100), [ExplodingDetector()])
    assert [f.severity for f in findings] == [Severity.INFO, Severity.WARNING]
    assert findings[1].step - 200 < 10


def test_without_a_loss_it_stays_info() -> None:
    unknown = [(None, norm) for _, norm in explosion(random.Random(0), 400, 0.2)]
    findings = diagnose(unknown)
    assert {f.pathology for f in findings} == {Pathology.EXPLODING}
    assert {f.severity for f in findings} == {Severity.INFO}


def test_growth_beside_a_loss_that_never_fell_is_a_warning_in_the_end() -> None:
    t = Thresholds()
    findings = diagnose(jump(1e4, [1.0] * 100), [ExplodingDetector()])
    assert [f.severity for f in findings] == [Severity.INFO, Severity.WARNING]
    assert t.stuck_persistence <= findings[1].step - 200 < t.stuck_persistence + 10
    assert "no better than early" in findings[1].message


def test_the_module_with_the_largest_norm_is_named() -> None:
    detector = ExplodingDetector()
    for step, (loss, norm) in enumerate(falling(random.Random(0), 100)):
        detector.observe(Observation(step, loss, norm))
    norms = {"embed.weight": 3.0, "rnn.weight_hh_l0": 900.0, "head.bias": 1.0}
    (finding,) = detector.observe(Observation(100, 1.0, 900.0, norms))
    assert finding.where == "rnn"
    assert "`rnn`" in finding.message


def test_zero_norms_teach_nothing() -> None:
    """A frozen stretch, then the old level again: not an explosion."""
    rng = random.Random(0)
    usual: Trace = [(1.0, math.exp(rng.gauss(0, 0.2))) for _ in range(200)]
    assert diagnose(usual + [(1.0, 0.0)] * 300 + usual, [ExplodingDetector()]) == []


def test_a_new_level_is_accepted_and_the_next_jump_is_seen() -> None:
    up = jump(50.0, [1.0] * 300)
    findings = diagnose(up + [(1.0, 50.0 * norm) for _, norm in up[200:210]], [ExplodingDetector()])
    assert [f.step for f in findings] == [200, 500]


def test_a_spike_on_a_noisy_loss_must_exceed_its_recent_spikes() -> None:
    """Two equal bad batches in a row of the same window are one piece of news."""
    rng = random.Random(0)
    trace = [(1.0 + rng.gauss(0, 0.05), 1.0) for _ in range(200)]
    trace[100], trace[140], trace[180] = (4.0, 1.0), (4.0, 1.0), (40.0, 1.0)
    found = [f for f in diagnose(trace) if f.pathology is Pathology.LOSS_SPIKE]
    assert [f.step for f in found] == [100, 180]


def test_one_usual_step_does_not_hide_an_explosion() -> None:
    trace = jump(100.0, [5.0] * 20)
    trace[203] = (5.0, 1.0)
    findings = diagnose(trace, [ExplodingDetector()])
    assert [(f.severity, f.step) for f in findings] == [
        (Severity.INFO, 200),
        (Severity.WARNING, 207),
    ]


def test_noise_of_many_orders_is_not_growth() -> None:
    rng = random.Random(0)
    trace = [(1.0 + rng.gauss(0, 0.05), math.exp(rng.gauss(0, 4.0))) for _ in range(3000)]
    # The noise is only known after a while; without it there would be dozens.
    assert len(diagnose(trace, [ExplodingDetector()])) <= 2


def test_growth_of_many_orders_is_no_explosion_if_it_takes_thousands_of_steps() -> None:
    trace = [(1.0, math.exp(0.005 * t)) for t in range(5000)]
    assert diagnose(trace, [ExplodingDetector()]) == []
    faster = [(1.0, math.exp(0.05 * t)) for t in range(500)]
    assert diagnose(faster, [ExplodingDetector()]) != []


def test_an_explosion_in_its_first_steps_survives_a_restart_anywhere() -> None:
    trace = explosion(random.Random(0), 0, 1.0, n=30)
    expected = diagnose(trace, [ExplodingDetector()])
    assert expected
    for k in range(1, 20):
        before, after = ExplodingDetector(), ExplodingDetector()
        found = diagnose(trace[:k], [before])
        after.load_state_dict(before.state_dict())
        for step, (loss, norm) in enumerate(trace[k:], k):
            found += after.observe(Observation(step, loss, norm))
        assert found == expected


# ---- loss ---------------------------------------------------------------------------------------


def test_a_blip_of_two_percent_is_no_spike_however_smooth_the_loss() -> None:
    smooth: Trace = [(0.7, 1.0)] * 100
    assert diagnose([*smooth, (0.714, 1.0), *smooth[:80]]) == []
    found = diagnose([*smooth, (1.4, 1.0), *smooth[:80]])
    assert [f.pathology for f in found] == [Pathology.LOSS_SPIKE]


def test_a_run_that_jumps_up_at_once_and_stays_there_is_diverging() -> None:
    rng = random.Random(0)
    start: Trace = [(2.3 + rng.gauss(0, 0.01), 1.0) for _ in range(4)]
    trace = start + [(20.0 + rng.gauss(0, 1.0), 1.0) for _ in range(200)]
    step = first(diagnose(trace), Pathology.DIVERGING, Severity.WARNING)
    assert step is not None
    assert step < 100


def test_a_second_divergence_is_found_again() -> None:
    rng = random.Random(0)
    phases = [(1.0, 320), (5.0, 320), (1.0, 320), (5.0, 320)]
    trace = [(level + rng.gauss(0, 0.05), 1.0) for level, steps in phases for _ in range(steps)]
    opened = [f.step for f in diagnose(trace) if f.pathology is Pathology.DIVERGING]
    assert sum(320 <= step < 640 for step in opened) == 2
    assert sum(960 <= step < 1280 for step in opened) == 2
    assert len(opened) == 4


def test_a_second_spike_from_the_level_of_the_first_is_seen() -> None:
    rng = random.Random(0)
    levels = [2.3] * 50 + [0.1] * 200 + [0.4] * 200 + [0.9] * 50
    trace = [(level * math.exp(rng.gauss(0, 0.03)), 1.0) for level in levels]
    findings = [f for f in diagnose(trace) if f.pathology is Pathology.LOSS_SPIKE]
    assert [(f.severity, f.step) for f in findings] == [(Severity.INFO, 250), (Severity.INFO, 450)]


def maximized(step: int) -> tuple[float, float]:
    """A negated cross-entropy: the loss falls ever faster, and the gradient grows with it."""
    return 2.3 - 0.02 * math.exp(step / 60), 0.3 * math.exp(step / 60)


def test_a_loss_that_falls_without_end_diverges() -> None:
    found = diagnose([maximized(step) for step in range(600)], [DivergingDetector()])
    assert [(f.pathology, f.severity) for f in found] == [(Pathology.DIVERGING, Severity.WARNING)]
    assert "sign is wrong" in found[0].message
    assert found[0].step < 500


@pytest.mark.parametrize("norm", [1.0, 100.0], ids=["same gradient", "larger gradient"])
def test_a_likelihood_that_falls_below_zero_and_slows_down_does_not(norm: float) -> None:
    fall = [2.0 - 60.0 * (1.0 - math.exp(-step / 150)) for step in range(1500)]
    trace = [(loss, 1.0 if step < 9 else norm) for step, loss in enumerate(fall)]
    assert diagnose(trace, [DivergingDetector()]) == []


def test_an_even_fall_with_a_gradient_that_does_not_grow_does_not() -> None:
    assert diagnose([(2.0 - 0.1 * step, 1.0) for step in range(900)], [DivergingDetector()]) == []
