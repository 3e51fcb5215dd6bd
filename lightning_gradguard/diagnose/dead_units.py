"""The detector of layers whose units are inactive whatever the input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.findings import Pathology, Severity
from lightning_gradguard.diagnose.layer_detector import LayerDetector
from lightning_gradguard.diagnose.layer_watch import Course, Look
from lightning_gradguard.diagnose.places import in_words, module_of
from lightning_gradguard.readings import ActivationReading, Inspection, ParameterReading

# Marks the places that are judged by the gradients of their weights' rows.
_ROWS = "/rows"


class DeadUnitsDetector(LayerDetector):
    """Units that are inactive for every input, so that they neither pass a signal nor train.

    The symptom is a layer of which `dead_share` of the units or more are dead, over at least
    `dead_examples` examples. It is a `WARNING` beside a loss that was bad at each inspection, and
    in a layer with `all_dead_share` beside one that is bad now. Beside a good loss it is `INFO`,
    and only if nearly all units are dead or `share_growth` of them died since the first inspection.

    A model in which no activation can be watched is judged by the share of weight rows whose
    gradient is exactly zero. Rows of unused classes and experts are zero too, so these count only
    beside a bad loss.
    """

    pathology = Pathology.DEAD_UNITS

    def _looks(self, inspection: Inspection, observation: Observation) -> Iterable[Look]:
        known = [r for r in inspection.activations if 0.0 <= r.dead <= 1.0]
        if inspection.activations:
            enough = self._thresholds.dead_examples
            return [self._look_at_units(r) for r in known if r.examples >= enough]
        return [self._look_at_rows(r) for r in _cause_of_zeros(inspection.parameters)]

    def _severity(self, look: Look, course: Course) -> Severity | None:
        if course.recovering:
            return None
        t, rows = self._thresholds, look.place.endswith(_ROWS)
        nearly_all = look.strength >= t.all_dead_share
        if course.harmful or (nearly_all and course.bad and not rows):
            return Severity.WARNING
        news = nearly_all or course.grown >= t.share_growth
        return Severity.INFO if news and not rows else None

    def _message(self, look: Look, course: Course, severity: Severity) -> str:
        loss = ""
        if severity >= Severity.WARNING:
            loss = f" while the loss {'gets worse' if course.worse else 'is no better than early'}"
        return f"{look.words}, so they neither pass a signal nor train{loss}."

    def _look_at_units(self, reading: ActivationReading) -> Look:
        where = reading.module or "model"
        return Look(
            place=where,
            where=where,
            symptom=reading.dead >= self._thresholds.dead_share,
            patience=self._usual,
            strength=reading.dead,
            words=f"Of {reading.units} units in {in_words(where)}, {_percent(reading.dead)} are "
            f"dead: inactive in each of {reading.examples} examples",
            evidence={
                "dead": reading.dead,
                "inactive": reading.inactive,
                "units": float(reading.units),
                "examples": float(reading.examples),
            },
        )

    def _look_at_rows(self, reading: ParameterReading) -> Look:
        return Look(
            place=reading.name + _ROWS,
            where=module_of(reading.name),
            symptom=reading.dead_rows >= self._thresholds.dead_share,
            patience=self._usual,
            strength=reading.dead_rows,
            words=f"Of the units of {in_words(module_of(reading.name))}, "
            f"{_percent(reading.dead_rows)} are dead: their gradient is exactly zero",
            evidence={"dead_rows": reading.dead_rows},
        )


def _cause_of_zeros(parameters: Sequence[ParameterReading]) -> list[ParameterReading]:
    """Returns the weights whose rows tell something of their own units.

    Where all rows of several weights in a row are zero, the last of them lets no gradient through
    to the others. And where no weight has a gradient, no unit is to blame.
    """
    known = [r for r in parameters if r.dims >= 2 and 0.0 <= r.dead_rows <= 1.0]
    if all(reading.dead_rows == 1.0 for reading in known):
        return []
    return [
        reading
        for reading, after in zip(known, [*known[1:], None], strict=True)
        if not (reading.dead_rows == 1.0 and after is not None and after.dead_rows == 1.0)
    ]


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f}%"
