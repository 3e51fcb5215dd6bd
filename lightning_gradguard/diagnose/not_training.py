"""The detector of layers that are not trained at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.idle_reasons import (
    FACTS,
    FOLLOWS,
    WORDS,
    Reason,
    Surroundings,
    common_path,
    severity_of,
)
from lightning_gradguard.diagnose.layer_detector import LayerDetector, consequence
from lightning_gradguard.diagnose.layer_watch import Course, Look, Patience
from lightning_gradguard.diagnose.places import in_words
from lightning_gradguard.diagnose.thresholds import Thresholds
from lightning_gradguard.readings import Inspection

# Modules of which it is remembered that they had a gradient; a bound on memory.
MAX_MODULES = 4096


class NotTrainingDetector(LayerDetector):
    """Modules that stay as they are: a fact that is read off the run, and why.

    `WARNING` without a look at the loss, after persistence, if a module

    - has a gradient but is in no optimizer;
    - is in an optimizer but ran only with gradients turned off, or ran but never gets a gradient
      (something is detached), and so did all before it: of others the loss may do without, and
      only a bad one makes them a `WARNING`;
    - has a gradient but a learning rate of exactly 0, unless all have;
    - has a gradient but updates of exactly 0: they are lost in rounding.

    A gradient of exactly zero is a `WARNING` only beside a bad loss, as dead units may be behind
    it. A module that never runs, single parameters of a module that get no gradient and
    parameters that are frozen by declaration are `INFO`.

    All modules with the same reason make one finding, at the first of them in order; frozen ones
    at their common path.
    """

    pathology = Pathology.LAYER_NOT_TRAINING

    _had_gradient: dict[str, None]
    # Per reason that was said: where, and how severe.
    _groups: dict[str, tuple[str, int]]

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        super().__init__(thresholds)
        self._clear()

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        inspection = self._watch.enter(observation)
        if inspection is None:
            return []
        lasting: dict[Reason, list[tuple[Look, Course]]] = {}
        for look in self._looks(inspection, observation):
            course = self._watch.follow(look, inspection.step)
            if course is not None:
                reason = Reason(look.place.partition("/")[0])
                lasting.setdefault(reason, []).append((look, course))
        self._watch.forget_idle()
        self._groups = {k: v for k, v in self._groups.items() if self._has_open(k)}
        return [f for reason, e in lasting.items() for f in self._say(reason, e, observation.step)]

    def is_open(self, where: str) -> bool:
        """Whether a module that a finding at ``where`` speaks of is still not trained."""
        return any(
            place == where and self._has_open(reason) for reason, (place, _) in self._groups.items()
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; see `Detector.state_dict`."""
        return {
            **super().state_dict(),
            "had_gradient": list(self._had_gradient),
            "groups": {reason: list(group) for reason, group in self._groups.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        super().load_state_dict(state)
        self._had_gradient = dict.fromkeys(state["had_gradient"])
        self._groups = {k: (where, severity) for k, (where, severity) in state["groups"].items()}

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._clear()

    def _clear(self) -> None:
        self._from_the_start = False  # as of the inspection that is looked at
        self._had_gradient = {}
        self._groups = {}

    def _has_open(self, reason: str) -> bool:
        return any(
            self._watch.has_open(place)
            for place in self._watch.places
            if place.partition("/")[0] == reason
        )

    def _looks(self, inspection: Inspection, observation: Observation) -> Iterable[Look]:
        t = self._thresholds
        model = Surroundings(inspection.parameters, t.touched_share, t.depth_factor)
        self._from_the_start = model.starts_untrained()
        followed, frozen = set(self._watch.places), []
        for module, readings in model.modules.items():
            if len(self._had_gradient) < MAX_MODULES and any(r.grad_norm >= 0 for r in readings):
                self._had_gradient[module] = None
            reason, known = model.reason(module, module in self._had_gradient)
            if reason is Reason.ZERO_GRADIENT:
                known = inspection.step > t.zero_gradient_start
            if reason is Reason.FROZEN:
                frozen.append(module)
                reason = None
            if known:
                yield from self._looks_at(module, reason, followed)
        # All of them are one place: a large frozen model must not use up those that are followed.
        place, where = f"{Reason.FROZEN.value}/", common_path(frozen)
        yield Look(place, where, bool(frozen), self._usual, strength=float(len(frozen)))

    def _looks_at(self, module: str, reason: Reason | None, followed: set[str]) -> Iterable[Look]:
        for other in Reason:
            place = f"{other.value}/{module}"
            if other is not Reason.FROZEN and (other is reason or place in followed):
                yield Look(place, module or "model", other is reason, self._patience(other))

    def _patience(self, reason: Reason) -> Patience:
        t = self._thresholds
        if reason is Reason.NO_OPTIMIZER:
            return Patience(t.fact_persistence, 0)
        if reason in (Reason.NO_GRAD, Reason.CUT_OFF):
            return Patience(t.layer_persistence, 0)
        if reason is Reason.ZERO_GRADIENT:
            return Patience(t.zero_gradient_persistence, 0)
        return self._usual

    def _say(
        self, reason: Reason, entries: list[tuple[Look, Course]], step: int
    ) -> Iterable[Finding]:
        """One finding for all modules that do not train for the same reason."""
        harmful = any(course.harmful for _, course in entries)
        severity = severity_of(reason, harmful=harmful, from_the_start=self._from_the_start)
        for look, _ in entries:
            self._watch.report(look, severity)
        where, said = self._groups.get(reason.value, ("", 0))
        if severity <= said:
            return
        (first, course), count = entries[0], round(sum(look.strength for look, _ in entries))
        where = where or first.where
        self._groups[reason.value] = where, int(severity)
        yield Finding(
            self.pathology,
            severity,
            where,
            step,
            {
                reason.value: 1.0,
                "modules": float(count),
                "inspections": float(course.inspections),
                **(course.loss if reason is Reason.ZERO_GRADIENT else {}),
            },
            _sentence(reason, where, count, course, severity),
            since=min(course.since for _, course in entries),
            fact=reason in FACTS,
        )


def _sentence(reason: Reason, where: str, count: int, course: Course, severity: Severity) -> str:
    one, many, what = WORDS[reason]
    subject, verb = in_words(where), one
    if reason is Reason.FROZEN:
        subject = f"{count} module{'s' if count > 1 else ''} in {subject}"
        verb = many if count > 1 else one
    elif count > 1:
        subject, verb = f"{subject} and {count - 1} more module{'s' if count > 2 else ''}", many
    follows = FOLLOWS.get(reason) or consequence(course, severity)
    subject = subject[0].upper() + subject[1:]
    looks = f"in each of the last {course.inspections} inspections"
    return f"{subject} {verb} {what} {looks}, {follows}."
