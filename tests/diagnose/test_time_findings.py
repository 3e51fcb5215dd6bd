"""Whole runs beside readings through time: what stays silent, and what is found when."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from lightning_gradguard.diagnose import (
    Observation,
    Pathology,
    Severity,
    Thresholds,
    VanishingInTimeDetector,
    time_detectors,
)
from lightning_gradguard.readings import ModelFacts
from tests.diagnose.time_runs import (
    EVERY,
    diagnose,
    reading,
    run,
    severities,
    solved,
    steady,
    stuck,
)
from tests.diagnose.traces import HEALTHY, learned_the_mean

T = Thresholds()


# ---- what stays silent --------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.44, 0.12], ids=["vanishing", "exploding"])
def test_a_symptom_beside_a_falling_loss_is_noted_once(rate: float) -> None:
    """A short memory is all that a short-memory task needs."""
    findings = diagnose(run(steady(rate), solved, 3000))
    assert severities(findings) == [Severity.INFO]
    assert "harmless" in findings[0].message


# Losses that never fall, or only after hundreds of steps, are no evidence that all is well; and
# where the noise is as large as the level, a hundred losses cannot tell better from as before.
STAYS = {"plateau_then_drop", "plateau_of_a_fifth", "warm_up", "slow_progress"}
NOISE = {"heavy_tailed", "batch_of_one"}


@pytest.mark.parametrize("name", sorted(HEALTHY.keys() - STAYS - NOISE))
def test_a_healthy_loss_beside_a_lasting_symptom_draws_no_warning(name: str) -> None:
    for seed in range(6):
        losses = [loss for loss, _ in HEALTHY[name](random.Random(seed), 600)]
        for rate in (-0.44, 0.12):
            findings = diagnose(run(steady(rate), losses.__getitem__))
            assert severities(findings) == [Severity.INFO], (seed, rate)


def test_a_gru_that_recovers_by_itself_is_not_even_noted() -> None:
    """-0.45 nats per step at first, the loss flat, then a longer reach before it falls."""
    for tau in (40.0, 80.0, 160.0, 300.0):
        rates = [-0.45 * math.exp(-step / tau) - 0.01 for step in range(1000)]
        level = stuck()
        losses = [level(step) * 0.99 ** max(0.0, step - 2 * tau) for step in range(1000)]
        assert diagnose(run(rates.__getitem__, losses.__getitem__, 1000)) == []


def test_a_rate_that_wanders_without_recovering_is_found() -> None:
    """The counterpart: noise of a few percent must not pass for a recovery."""
    rng = random.Random(0)
    findings = diagnose(run(lambda _: -0.44 + rng.gauss(0, 0.01), stuck()))
    assert severities(findings)[-1] == Severity.WARNING


@pytest.mark.parametrize(
    ("rise", "error"), [(0.02, 0.001), (0.07, 0.1)], ids=["too small", "within its error"]
)
def test_a_rise_that_is_no_recovery_deserves_no_patience(rise: float, error: float) -> None:
    findings = diagnose(
        run(lambda s: -0.44 + min(s / 128, 1.0) * rise, stuck(), 129, decay_error=error)
    )
    assert severities(findings) == [Severity.WARNING]


def test_a_converged_model_draws_no_warning() -> None:
    findings = diagnose(run(lambda _: -2.0, lambda s: 2.3 * math.exp(-0.05 * s) + 1e-8, 2000))
    assert severities(findings) == [Severity.INFO]


@pytest.mark.parametrize("rate", [-0.44, 0.12], ids=["vanishing", "exploding"])
@pytest.mark.parametrize("loss", [None, math.nan], ids=["unknown", "NaN"])
def test_without_a_loss_it_stays_info(rate: float, loss: float | None) -> None:
    assert severities(diagnose(run(steady(rate), lambda _: loss))) == [Severity.INFO]


SILENT: dict[str, dict[str, Any]] = {
    "too short": {"timesteps": T.least_timesteps - 1},
    "no recurrence": {"source": "output"},
    "unknown rate": {"decay_rate": math.nan},
    "infinite rate": {"decay_rate": -math.inf},
    "unbounded error": {"decay_error": math.inf},
    "within its error": {"decay_error": 5.0},
    "in the horizon": {"timesteps": 20},
}


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("rate", [-0.5, 0.3], ids=["vanishing", "exploding"])
def test_readings_that_prove_nothing_are_ignored(name: str, rate: float) -> None:
    detectors = time_detectors()
    assert diagnose(run(steady(rate), stuck(), **SILENT[name]), detectors) == []
    assert not any(d.wants_exact for d in detectors)


def test_the_bound_is_a_share_of_the_sequence_at_the_optimistic_end() -> None:
    edge = -math.log(1e3) / (T.short_horizon * 120)
    for rate, found in ((edge * 1.02 - 0.01, 1), (edge * 0.98 - 0.01, 0)):
        findings = diagnose(run(steady(rate), lambda _: None))
        assert len(findings) == found


@pytest.mark.parametrize("n", [0, 1])
def test_an_empty_run_and_one_step_say_nothing_of_vanishing(n: int) -> None:
    assert diagnose(run(lambda _: -3.0, stuck(), n)) == []


# ---- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 10, 100])
def test_vanishing_beside_a_stuck_loss_is_a_warning_after_persistence(every: int) -> None:
    findings = diagnose(run(steady(-0.44), stuck(), every=every))
    assert severities(findings) == [Severity.WARNING]
    assert findings[0].pathology is Pathology.VANISHING_IN_TIME
    gap = max(every, T.time_spacing)
    assert findings[0].step == (T.time_persistence - 1) * gap
    assert findings[0].evidence["readings"] == T.time_persistence


def test_vanishing_in_a_run_that_learned_only_the_mean_is_a_warning() -> None:
    for seed in range(3):
        losses = [loss for loss, _ in learned_the_mean(random.Random(seed), 1500)]
        findings = diagnose(run(steady(-0.44), losses.__getitem__, 1500))
        assert severities(findings) == [Severity.INFO, Severity.WARNING]


def test_a_long_plan_gives_a_flat_start_more_time() -> None:
    steps = run(steady(-0.44), stuck(), 1000)
    for planned, least in ((1000, 2 * T.time_spacing), (20_000, T.time_share * 20_000)):
        model = ModelFacts(planned_steps=planned)
        findings = diagnose(replace(step, model=model) for step in steps)
        assert severities(findings)[-1] == Severity.WARNING
        assert least <= findings[-1].step < least + 2 * T.time_spacing
        assert findings[-1].since == 0


def test_a_stuck_loss_below_zero_is_stuck_too() -> None:
    findings = diagnose(run(steady(-0.44), stuck(level=-2.3)))
    assert severities(findings) == [Severity.WARNING]


def test_vanishing_beside_a_loss_that_gets_worse_is_a_warning() -> None:
    g = stuck(noise=0.01)
    findings = diagnose(run(steady(-0.44), lambda s: solved(s) if s < 400 else 3.0 * g(s), 1000))
    assert severities(findings) == [Severity.INFO, Severity.WARNING]
    assert findings[1].step >= 400
    assert "getting worse" in findings[1].message


def test_an_explosion_is_noted_at_once_and_a_warning_when_it_lasts() -> None:
    findings = diagnose(run(steady(0.12), stuck()))
    assert severities(findings) == [Severity.INFO, Severity.WARNING]
    assert {f.pathology for f in findings} == {Pathology.EXPLODING}
    assert [f.step for f in findings] == [0, 2 * T.time_spacing]
    assert findings[0].where == "rnn"


def test_an_explosion_without_a_known_error_waits_for_more_readings() -> None:
    findings = diagnose(run(steady(0.12), stuck(), decay_error=math.nan))
    assert [(f.severity, f.step) for f in findings] == [(Severity.WARNING, 2 * T.time_spacing)]


def test_an_explosion_that_dies_down_is_no_warning() -> None:
    findings = diagnose(run(lambda s: 0.3 * math.exp(-s / 200), stuck()))
    assert severities(findings) == [Severity.INFO]


def test_the_episode_ends_and_a_second_one_is_said_again() -> None:
    phases = {0: -0.44, 1: -0.01, 2: -0.44}
    findings = diagnose(run(lambda s: phases[s // 400], stuck(), 1200))
    assert severities(findings) == [Severity.WARNING, Severity.WARNING]
    short_break = diagnose(run(lambda s: -0.01 if s // 64 == 6 else -0.44, stuck(), 1200))
    assert severities(short_break) == [Severity.WARNING]


def test_steps_that_are_counted_anew_do_not_stop_the_watch() -> None:
    detector = VanishingInTimeDetector()
    again = run(steady(-0.44), stuck(), 100)
    findings = diagnose([*run(lambda _: -0.01, stuck(), 1000), *again, *again], [detector])
    assert severities(findings) == [Severity.WARNING]


def test_the_input_speaks_only_for_modules_without_exact_readings() -> None:
    whole = reading(-0.44, source="input", part="")
    layers = (reading(-0.01), reading(-0.01, part="l1"))
    assert severities(diagnose(run(lambda _: [whole], stuck()))) == [Severity.WARNING]
    assert diagnose(run(lambda _: [whole, *layers], stuck())) == []
    once = run(lambda s: layers if s == EVERY else [whole], stuck())
    assert diagnose(once) == []


# ---- asking for more ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.44, 0.12], ids=["vanishing", "exploding"])
def test_a_detector_asks_only_as_often_as_it_needs(rate: float) -> None:
    """A pipeline that measures when asked needs `time_persistence` exact readings in all."""
    detectors = time_detectors()
    loss, findings, measured, asked = stuck(), [], 0, True
    for step in range(600):
        time = (reading(rate),) if asked else ()
        measured += asked
        findings += [
            f for d in detectors for f in d.observe(Observation(step, loss(step), 1.0, None, time))
        ]
        asked = any(d.wants_exact for d in detectors)
    assert severities(findings)[-1] == Severity.WARNING
    assert measured == T.time_persistence


def test_nothing_is_asked_without_symptom_or_beside_a_falling_loss() -> None:
    for rate, loss in ((-0.01, stuck()), (-0.44, solved), (-0.44, lambda _: None)):
        detectors = time_detectors()
        for step in run(steady(rate), loss, 300, every=1000):
            for detector in detectors:
                detector.observe(step)
                assert not (step.step > 150 and detector.wants_exact)


def test_a_module_that_is_never_measured_again_is_not_asked_for_ever() -> None:
    detector = VanishingInTimeDetector()
    asked = 0
    for step in run(steady(-0.44), stuck(), 2000, every=10_000):
        detector.observe(step)
        asked += detector.wants_exact
    assert 0 < asked <= T.time_spacing
