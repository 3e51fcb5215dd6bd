"""The detectors of a gradient that vanishes or explodes on its way back through time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.places import in_words
from lightning_gradguard.diagnose.thresholds import Thresholds
from lightning_gradguard.diagnose.time_remedies import explosion_remedies, vanishing_remedies
from lightning_gradguard.diagnose.time_watch import TimeWatch, Verdict
from lightning_gradguard.diagnose.time_ways import steps_to_bridge
from lightning_gradguard.readings import HORIZON_FACTOR, ModelFacts, TimeReading

_CAUSES = {
    "forget_gate": "mean forget gate",
    "update_gate": "mean update gate",
    "activation_slope": "mean activation slope",
    "spectral_radius": "spectral radius",
}


class _DecayDetector(ABC):
    """What both detectors do alike."""

    _note_at_once: bool

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = thresholds or Thresholds()
        self._watch = TimeWatch(
            self._thresholds, self._is_symptom, self._steps, note_at_once=self._note_at_once
        )

    @abstractmethod
    def _is_symptom(self, rate: float, error: float, timesteps: int) -> bool:
        """Whether a rate is bad beyond its error over so many timesteps."""

    @abstractmethod
    def _steps(self, reading: TimeReading, model: ModelFacts) -> int:
        """Over how many timesteps of a reading the rate matters."""

    @abstractmethod
    def _finding(self, verdict: Verdict, step: int) -> Finding:
        """A verdict in words."""

    @property
    def wants_exact(self) -> bool:
        """Whether another exact reading would help; see `TimeDetector.wants_exact`."""
        return self._watch.wants_exact

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        verdicts = self._watch.observe(observation)
        return [self._finding(verdict, observation.step) for verdict in verdicts]

    def is_open(self, where: str) -> bool:
        """Whether what was found in a module has not healed; see `Detector.is_open`."""
        return self._watch.is_open(where)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; see `Detector.state_dict`."""
        return self._watch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        self._watch.load_state_dict(state)

    def reset(self) -> None:
        """Forgets everything."""
        self._watch.reset()


class VanishingInTimeDetector(_DecayDetector):
    """A gradient that reaches only a small part of the sequence.

    The symptom is a horizon below `short_horizon` of the timesteps even at the optimistic end of
    the rate's confidence interval; where attention reads the states, of those timesteps only that
    come before the first which it reaches. `INFO` when it lasts `time_persistence` readings;
    `WARNING` when at each of them the loss was no better than early in training, or worse. Neither
    while the rate rises: many a module starts with a short horizon and recovers by itself. Without
    a known loss there is no functional evidence, so no finding is above `INFO`.

    State is kept per layer and direction. A finding's episode ends after `time_persistence`
    readings without the symptom.
    """

    _note_at_once = False

    def _is_symptom(self, rate: float, error: float, timesteps: int) -> bool:
        share = self._thresholds.short_horizon * timesteps
        return -(rate + error) * share > math.log(HORIZON_FACTOR)

    def _steps(self, reading: TimeReading, model: ModelFacts) -> int:
        return steps_to_bridge(reading, model)

    def _finding(self, verdict: Verdict, step: int) -> Finding:
        symptom = _vanishing_in_words(verdict.reading)
        harmless = "which is harmless if only recent steps matter"
        return _finding(Pathology.VANISHING_IN_TIME, verdict, step, symptom, harmless)


class TimeExplosionDetector(_DecayDetector):
    """A gradient that grows by orders of magnitude from the end of the sequence to its start.

    The symptom is a growth over all timesteps beyond `growth` (three orders of magnitude) even at
    the lower end of the rate's confidence interval: `INFO` at once. It is a `WARNING` when it
    lasts `time_persistence` readings, at each of which the loss was no better than early in
    training, or worse, and the rate is not falling. Without a known loss it stays `INFO`.

    State is kept as in `VanishingInTimeDetector`.
    """

    _note_at_once = True

    def _is_symptom(self, rate: float, error: float, timesteps: int) -> bool:
        return (rate - error) * timesteps > self._thresholds.growth

    def _steps(self, reading: TimeReading, model: ModelFacts) -> int:
        return reading.timesteps

    def _finding(self, verdict: Verdict, step: int) -> Finding:
        symptom = _explosion_in_words(verdict.reading)
        harmless = "which is harmless as long as the loss falls"
        return _finding(Pathology.EXPLODING, verdict, step, symptom, harmless)


def _finding(
    pathology: Pathology, verdict: Verdict, step: int, symptom: str, harmless: str
) -> Finding:
    reading, vanishes = verdict.reading, pathology is Pathology.VANISHING_IN_TIME
    if verdict.severity is Severity.INFO:
        follows = harmless
    elif verdict.worse:
        follows = "while the loss is getting worse"
    else:
        follows = "while the loss is no better than early in training"
    causes = _causes_in_words(reading)
    return Finding(
        pathology,
        verdict.severity,
        reading.module or "model",
        step,
        _evidence(verdict),
        f"The gradient {'vanishes' if vanishes else 'explodes'} through time in "
        f"{_place(reading)}: {symptom}{causes}, {follows}.",
        vanishing_remedies(reading) if vanishes else explosion_remedies(reading),
        since=verdict.since,
    )


def _place(reading: TimeReading) -> str:
    module = in_words(reading.module or "model")
    if not reading.part:
        return module
    layer, _, reverse = reading.part.partition("_")
    words = "all layers" if layer == "layers" else f"layer {layer.removeprefix('l')}"
    return f"{module} ({words}{', reverse direction' if reverse else ''})"


def _vanishing_in_words(reading: TimeReading) -> str:
    horizon = f"{reading.horizon:.0f}" if reading.horizon >= 1.0 else "less than 1"
    return (
        f"it halves every {_steps(reading.half_life)} and reaches {horizon} of "
        f"{reading.timesteps} steps"
    )


def _explosion_in_words(reading: TimeReading) -> str:
    decades = reading.decay_rate * reading.timesteps / math.log(10.0)
    return (
        f"it doubles every {_steps(reading.half_life)} and grows by {decades:.0f} orders of "
        f"magnitude over {reading.timesteps} steps"
    )


def _steps(count: float) -> str:
    text = f"{count:.2g}" if count < 10.0 else f"{count:.0f}"
    return "step" if text == "1" else f"{text} steps"


def _causes_in_words(reading: TimeReading) -> str:
    causes = _finite(reading.causes)
    named = [f"a {words} of {causes[key]:.2f}" for key, words in _CAUSES.items() if key in causes]
    return f", as follows from {' and '.join(named)}" if named else ""


def _evidence(verdict: Verdict) -> dict[str, float]:
    reading = verdict.reading
    return _finite(
        {
            "decay_rate": reading.decay_rate,
            "decay_error": reading.decay_error,
            "half_life": reading.half_life,
            "horizon": reading.horizon,
            "timesteps": float(reading.timesteps),
            "recency": reading.recency,
            "readings": float(verdict.count),
            **reading.causes,
            **verdict.loss,
        }
    )


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
