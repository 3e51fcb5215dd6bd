"""The detector of layers whose units are stuck where their slope is nearly zero."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.findings import Pathology, Severity
from lightning_gradguard.diagnose.layer_detector import LayerDetector
from lightning_gradguard.diagnose.layer_watch import Course, Look
from lightning_gradguard.diagnose.places import in_words
from lightning_gradguard.readings import ActivationReading, Inspection


class SaturationDetector(LayerDetector):
    """Units of `tanh`, `sigmoid` and the like that stay in their flat parts.

    The symptom is a layer of which `saturated_share` of the units or more are saturated. It is a
    `WARNING` beside a loss that was bad at each inspection, and `INFO` beside a good one only if
    `share_growth` of the units saturated since the first inspection: gates saturate by design.
    """

    pathology = Pathology.SATURATED

    def _looks(self, inspection: Inspection, observation: Observation) -> Iterable[Look]:
        return [self._look(r) for r in inspection.activations if 0.0 <= r.saturated <= 1.0]

    def _severity(self, look: Look, course: Course) -> Severity | None:
        severity = super()._severity(look, course)
        grown = course.grown >= self._thresholds.share_growth
        return None if severity is Severity.INFO and not grown else severity

    def _message(self, look: Look, course: Course, severity: Severity) -> str:
        share = 100.0 * (look.strength - course.grown)
        if course.grown >= self._thresholds.share_growth:
            past = f"up from {share:.0f}% at first"
        else:
            past = "nearly as many as at first"
        loss = ""
        if severity >= Severity.WARNING:
            loss = f" while the loss {'gets worse' if course.worse else 'is no better than early'}"
        return f"{look.words} ({past}), so they pass hardly any gradient{loss}."

    def _look(self, reading: ActivationReading) -> Look:
        where = reading.module or "model"
        return Look(
            place=where,
            where=where,
            symptom=reading.saturated >= self._thresholds.saturated_share,
            patience=self._usual,
            strength=reading.saturated,
            words=f"Of {reading.units} units in {in_words(where)}, "
            f"{100.0 * reading.saturated:.0f}% are saturated",
            evidence={"saturated": reading.saturated, "units": float(reading.units)},
        )
