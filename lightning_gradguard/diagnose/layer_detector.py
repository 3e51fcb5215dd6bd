"""When a symptom in a layer is worth saying: what the detectors of inspections share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.layer_watch import Course, LayerWatch, Look, Patience
from lightning_gradguard.diagnose.thresholds import Thresholds
from lightning_gradguard.readings import Inspection


class LayerDetector(ABC):
    """What the detectors of inspections do alike.

    A symptom is `INFO` when it lasts `layer_persistence` inspections in a row that span
    `layer_span` steps, and a `WARNING` when at each of them the loss was no better than early in
    training, or worse, and `layer_share` of the planned steps are over. Neither while it recovers.

    Without a known loss there is no functional evidence, so no finding but a fact is above `INFO`.
    An episode ends after as many inspections without the symptom as its patience asks for.
    """

    pathology: ClassVar[Pathology]

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = t = thresholds or Thresholds()
        self._usual = Patience(t.layer_persistence, t.layer_span)
        self._watch = LayerWatch(t)

    @abstractmethod
    def _looks(self, inspection: Inspection, observation: Observation) -> Iterable[Look]:
        """What the inspection says of each place that it knows of."""

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        inspection = self._watch.enter(observation)
        if inspection is None:
            return []
        found = []
        for look in self._looks(inspection, observation):
            course = self._watch.follow(look, inspection.step)
            severity = None if course is None else self._severity(look, course)
            if course is None or severity is None or not self._watch.report(look, severity):
                continue
            found.append(self._finding(look, course, severity, observation.step))
        return found

    def is_open(self, where: str) -> bool:
        """Whether what was found at a place has not healed; see `Detector.is_open`."""
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

    def _severity(self, look: Look, course: Course) -> Severity | None:
        """How bad a symptom is that has lasted; `None` if it is not worth saying."""
        if course.recovering:
            return None
        return Severity.WARNING if course.harmful else Severity.INFO

    def _message(self, look: Look, course: Course, severity: Severity) -> str:
        """One plain sentence."""
        return f"{look.words}, {consequence(course, severity)}."

    def _finding(self, look: Look, course: Course, severity: Severity, step: int) -> Finding:
        numbers = {**look.evidence, "inspections": float(course.inspections), **course.loss}
        return Finding(
            self.pathology,
            severity,
            look.where,
            step,
            {name: value for name, value in numbers.items() if math.isfinite(value)},
            self._message(look, course, severity),
            since=course.since,
        )


def consequence(course: Course, severity: Severity) -> str:
    """Returns what the loss says beside a symptom."""
    if severity < Severity.WARNING:
        return "which is harmless as long as the loss falls"
    if course.worse:
        return "while the loss is getting worse"
    return "while the loss is no better than early in training"
