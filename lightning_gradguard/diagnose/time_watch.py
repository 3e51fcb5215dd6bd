"""When a symptom in the gradient through time is worth saying: the gate of both time detectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Severity
from lightning_gradguard.diagnose.progress import LossProgress, known_loss
from lightning_gradguard.diagnose.thresholds import Thresholds
from lightning_gradguard.diagnose.time_ways import stacks_as_one
from lightning_gradguard.readings import ModelFacts, TimeReading

# Layers and directions that are followed; a bound on memory, far above any real model's.
MAX_PARTS = 512


@dataclass(frozen=True)
class Verdict:
    """A reading that is worth saying.

    Attributes:
        reading: The newest reading of the module's part.
        severity: `INFO`, or `WARNING` if the gate has passed.
        count: Readings in a row with the symptom, up to `Thresholds.time_persistence`.
        worse: Whether the loss is getting worse; if not, at a warning, it is no better than early.
        loss: Present and early level of the loss; empty while they are not known.
        since: Step of the first of the readings in a row with the symptom.
    """

    reading: TimeReading
    severity: Severity
    count: int
    worse: bool
    loss: Mapping[str, float]
    since: int | None = None


class _Part:
    """What is remembered of one layer and direction."""

    __slots__ = ("causes", "episode", "marks", "since", "step")

    def __init__(self, heal_readings: int) -> None:
        self.episode = Episode(heal_readings)
        self.step: int | None = None
        self.causes: dict[str, float] = {}
        self.since: int | None = None
        # Per reading of the present run of symptoms: rate, error, whether the loss was bad.
        self.marks: list[tuple[float, float, bool]] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "causes": dict(self.causes),
            "since": self.since,
            "marks": [list(mark) for mark in self.marks],
            "episode": self.episode.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.causes = dict(state["causes"])
        self.since = state["since"]
        self.marks = [(rate, error, bad) for rate, error, bad in state["marks"]]
        self.episode.load_state_dict(state["episode"])


class TimeWatch:
    """Follows one symptom in every part of every module, beside the loss.

    A reading counts if its rate is a finite number that rests on all states or on the whole
    signal, its sequences are not too short, and it is `time_spacing` steps younger than the last
    that counted. A module that has readings of several layers or directions is judged by these
    alone; with one, what is read of the module is read of it. A dilated stack is judged as one.

    `INFO` when the symptom lasts `time_persistence` readings in a row; `WARNING` when at all of
    them but one the loss was no better than early, or worse, and `time_share` of the planned steps
    are over. Neither while the rate recovers.

    Args:
        thresholds: The numbers that decide.
        symptom: Whether a rate (never NaN) is bad beyond its error over so many timesteps.
        steps: Over how many of a reading's timesteps it matters.
        note_at_once: Whether one reading with a known error is enough for `INFO`.
    """

    _parts: dict[str, _Part]
    _step: int | None
    _planned: int

    def __init__(
        self,
        thresholds: Thresholds,
        symptom: Callable[[float, float, int], bool],
        steps: Callable[[TimeReading, ModelFacts], int],
        *,
        note_at_once: bool,
    ) -> None:
        self._thresholds = thresholds
        self._symptom = symptom
        self._steps = steps
        self._note_at_once = note_at_once
        self._progress = LossProgress(thresholds)
        self.reset()

    @property
    def wants_exact(self) -> bool:
        """Whether some part waits for another reading that would count, beside a bad loss.

        Asks for `time_spacing` steps at most: a part that gives no reading any more must not be
        measured at every step for ever.
        """
        waiting = any(self._is_waiting(part) for part in self._parts.values())
        return waiting and self._loss_is_bad()

    def observe(self, observation: Observation) -> list[Verdict]:
        """Takes in one step; returns what became known with it, in the order of the readings."""
        if observation.new_phase:
            self._progress.new_phase()
        loss = known_loss(observation)
        if loss is not None:
            self._progress.update(loss)
        self._step = observation.step
        self._planned = observation.model.planned_steps or 0
        readings = stacks_as_one(observation.time, observation.model)
        usable = [self._with_part(reading) for reading in readings if self._is_usable(reading)]
        if not usable:
            return []
        for reading in usable:
            if reading.part:
                self._parts.pop(reading.module, None)
        split = {name.rpartition("/")[0] for name in self._parts if "/" in name}
        split |= {reading.module for reading in usable if reading.part}
        found = []
        for reading in usable:
            if reading.part or reading.module not in split:
                found += self._follow(reading, observation.model)
        return found

    def is_open(self, where: str) -> bool:
        """Whether what was found in some part of the module at ``where`` has not healed."""
        return any(
            part.episode.open and (name.partition("/")[0] or "model") == where
            for name, part in self._parts.items()
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings, lists and dicts."""
        return {
            "progress": self._progress.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "step": self._step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self._progress.load_state_dict(state["progress"])
        self._parts = {name: _Part(self._needed) for name in state["parts"]}
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self._step = state["step"]

    def reset(self) -> None:
        """Forgets everything."""
        self._progress.reset()
        self._parts = {}
        self._step = None
        self._planned = 0

    @property
    def _needed(self) -> int:
        return self._thresholds.time_persistence

    def _loss_is_bad(self) -> bool:
        progress = self._progress
        stuck = progress.is_stuck() or progress.crawls(self._planned or None)
        return progress.is_worse() or stuck

    def _is_early(self) -> bool:
        """Whether so little of the run is over that a flat loss means nothing."""
        t = self._thresholds
        least = max(2 * t.time_spacing, int(t.time_share * self._planned))
        return self._progress.count <= least

    def _with_part(self, reading: TimeReading) -> TimeReading:
        """A cheap reading of a module of one layer and direction is one of that."""
        if reading.part:
            return reading
        parts = [name for name in self._parts if name.startswith(f"{reading.module}/")]
        return replace(reading, part=parts[0].partition("/")[2]) if len(parts) == 1 else reading

    def _is_usable(self, reading: TimeReading) -> bool:
        return (
            reading.source in ("exact", "input")
            and math.isfinite(reading.decay_rate)
            and reading.timesteps >= self._thresholds.least_timesteps
        )

    def _age(self, part: _Part) -> int | None:
        """Steps since the last reading that counted; below zero where steps are counted anew."""
        return None if self._step is None or part.step is None else self._step - part.step

    def _is_due(self, part: _Part) -> bool:
        age = self._age(part)
        return age is None or not 0 <= age < self._thresholds.time_spacing

    def _is_waiting(self, part: _Part) -> bool:
        age, spacing = self._age(part), self._thresholds.time_spacing
        confirmed = sum(bad for _, _, bad in part.marks)
        return (
            bool(part.marks)
            and confirmed < self._needed
            and age is not None
            and spacing <= age < 2 * spacing
        )

    def _follow(self, reading: TimeReading, model: ModelFacts) -> list[Verdict]:
        part = self._parts.get(reading.name)
        if part is None:
            if len(self._parts) >= MAX_PARTS:
                return []
            part = self._parts[reading.name] = _Part(self._needed)
        if not self._is_due(part):
            return []
        part.step = self._step
        if reading.causes:
            part.causes = {k: v for k, v in reading.causes.items() if math.isfinite(v)}
        # Without an interval of its own, a reading stands only together with the ones after it.
        known = reading.decay_error >= 0.0
        error = reading.decay_error if known else 0.0
        steps = self._steps(reading, model)
        if not self._symptom(reading.decay_rate, error, steps):
            part.marks = []
            part.episode.calm()
            return []
        # The first losses of a run are the early level: no better than early, so far.
        bad = self._loss_is_bad() or not self._progress.ready
        if not part.marks:
            part.since = self._step
        mark = (reading.decay_rate, error, bad)
        part.marks = [*part.marks, mark][-self._needed :]
        severity = self._judge(part, known)
        if severity is None or not part.episode.report(severity):
            return []
        return [self._verdict(reading, severity, part)]

    def _judge(self, part: _Part, known: bool) -> Severity | None:
        if len(part.marks) < self._needed:
            return Severity.INFO if self._note_at_once and known else None
        if self._is_recovering(part):
            return None
        if self._is_early() or not self._loss_is_bad():
            return Severity.INFO
        # The loss is judged from the beginning each time, and one lucky block may have hidden it.
        often = sum(bad for *_, bad in part.marks) >= self._needed - 1
        return Severity.WARNING if often else Severity.INFO

    def _is_recovering(self, part: _Part) -> bool:
        (first, first_error, _), (last, last_error, _) = part.marks[0], part.marks[-1]
        gone = abs(first) - abs(last)
        least = self._thresholds.recovery * abs(first)
        return gone > max(least, math.hypot(first_error, last_error))

    def _verdict(self, reading: TimeReading, severity: Severity, part: _Part) -> Verdict:
        progress = self._progress
        # A cheap reading knows of no causes; those of the last exact one are not long past.
        reading = replace(reading, causes=reading.causes or part.causes)
        loss = {"loss": progress.present, "early_loss": progress.start} if progress.ready else {}
        return Verdict(reading, severity, len(part.marks), progress.is_worse(), loss, part.since)
