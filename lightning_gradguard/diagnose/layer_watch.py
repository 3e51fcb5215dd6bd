"""How long a symptom in a layer lasts, and what the loss does meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Severity
from lightning_gradguard.diagnose.progress import LossProgress, known_loss
from lightning_gradguard.diagnose.thresholds import Thresholds
from lightning_gradguard.readings import Inspection

# Places that are followed; a bound on memory, far above what is ever found in one model.
MAX_PLACES = 512


@dataclass(frozen=True)
class Patience:
    """How long a symptom must last: inspections in a row, and the steps that they span."""

    inspections: int
    steps: int


@dataclass(frozen=True)
class Look:
    """What one inspection says of one place.

    Attributes:
        place: What the symptom is followed by, in most detectors the module.
        where: Where a finding would be.
        symptom: Whether it is there.
        patience: How long it must last.
        strength: How bad it is, above 0 and finite; falls as the symptom recovers.
        error: Half width of the confidence interval of the strength.
        words: The symptom as the main clause of a sentence.
        evidence: Numbers that the words rest on.
    """

    place: str
    where: str
    symptom: bool
    patience: Patience
    strength: float = 1.0
    error: float = 0.0
    words: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Course:
    """How a symptom that has lasted long enough went so far.

    Attributes:
        since: Step at which the symptom began.
        inspections: Inspections in a row that have shown it, as far as they are remembered.
        peak: Largest strength since it began.
        grown: Rise of the strength since the first inspection of the place.
        recovering: Whether the strength falls by more than its error.
        known: Whether enough of the run is over for its loss to mean something.
        bad: Whether the loss is no better than early in training, or getting worse.
        harmful: Whether it was so at each of the inspections, as far as it was known.
        worse: Whether the loss is getting worse.
        loss: Present and early level of the loss; empty while they are not known.
    """

    since: int
    inspections: int
    peak: float
    grown: float
    recovering: bool
    known: bool
    bad: bool
    harmful: bool
    worse: bool
    loss: Mapping[str, float]


class _Place:
    """What is remembered of one place."""

    __slots__ = ("episode", "first", "marks", "peak", "since", "where")

    def __init__(self, heal_inspections: int) -> None:
        self.episode = Episode(heal_inspections)
        self.where = ""
        self.first: float | None = None
        self.peak = 0.0
        self.since: int | None = None
        # Per inspection of the present run of symptoms: step, strength, error, whether the loss was
        # bad; as many as patience needs.
        self.marks: list[tuple[int, float, float, bool]] = []

    def enter(self, step: int, look: Look, bad: bool) -> None:
        if self.marks and step <= self.marks[-1][0]:
            self.marks, self.since = [], None  # steps are counted anew
        if self.since is None:
            self.since, self.peak = step, look.strength
        self.peak = max(self.peak, look.strength)
        marks, patience = [*self.marks, (step, look.strength, look.error, bad)], look.patience
        while len(marks) > patience.inspections and step - marks[1][0] >= patience.steps:
            del marks[0]
        self.marks = marks

    def has_lasted(self, patience: Patience) -> bool:
        """Whether the symptom has lasted long enough."""
        if not self.marks:
            return False
        span = self.marks[-1][0] - self.marks[0][0]
        return len(self.marks) >= patience.inspections and span >= patience.steps

    def calm(self) -> None:
        self.marks, self.since = [], None
        self.episode.calm()

    def state_dict(self) -> dict[str, Any]:
        return {
            "episode": self.episode.state_dict(),
            "heal": self.episode.heal_steps,
            "where": self.where,
            "first": self.first,
            "peak": self.peak,
            "since": self.since,
            "marks": [list(mark) for mark in self.marks],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Place:
        place = cls(state["heal"])
        place.episode.load_state_dict(state["episode"])
        place.where, place.first, place.since = state["where"], state["first"], state["since"]
        place.peak = state["peak"]
        place.marks = [(step, value, error, bad) for step, value, error, bad in state["marks"]]
        return place


class LayerWatch:
    """Follows symptoms at many places, beside the loss.

    An inspection counts once. A place that it does not know of is left as it was. A change of
    course (`Observation.new_phase`) ends no symptom: what a layer does before and after it counts.

    Args:
        thresholds: The numbers that decide.
    """

    _places: dict[str, _Place]
    _step: int | None
    _planned: int

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._progress = LossProgress(thresholds)
        self.reset()

    @property
    def places(self) -> tuple[str, ...]:
        """What is followed."""
        return tuple(self._places)

    def enter(self, observation: Observation) -> Inspection | None:
        """Takes in the loss of a step; returns its inspection if that is news."""
        if observation.new_phase:
            self._progress.new_phase()
        loss = known_loss(observation)
        if loss is not None:
            self._progress.update(loss)
        self._planned = observation.model.planned_steps or 0
        inspection = observation.inspection
        if inspection is None or inspection.step == self._step:
            return None
        self._step = inspection.step
        return inspection

    @property
    def knows_loss(self) -> bool:
        """Whether enough of the run is over for its loss to mean something."""
        t, count = self._thresholds, self._progress.count
        # Within two blocks the present level would be compared with itself.
        return self._progress.ready and count >= max(2 * t.block, t.layer_share * self._planned)

    @property
    def loss_is_bad(self) -> bool:
        """The gate: the loss is no better than early or at first, or getting worse."""
        progress = self._progress
        if not self.knows_loss:
            return False
        stuck = progress.is_stuck() or progress.crawls(self._planned or None)
        return progress.is_worse() or stuck or self._never_better()

    def has_lasted(self, place: str, patience: Patience) -> bool:
        """Whether the symptom had lasted long enough when the place was last looked at."""
        return place in self._places and self._places[place].has_lasted(patience)

    def follow(self, look: Look, step: int) -> Course | None:
        """Takes in a look; returns the course of its symptom if that has lasted long enough."""
        place = self._places.get(look.place)
        if place is None:
            if len(self._places) >= MAX_PLACES:
                return None
            place = self._places[look.place] = _Place(look.patience.inspections)
        if place.first is None:
            place.first = look.strength
        if not look.symptom:
            place.calm()
            return None
        bad = self.loss_is_bad
        # The first losses of a run are the early level: no better than early, so far.
        place.enter(step, look, bad or not self.knows_loss)
        return self._course(place, bad) if place.has_lasted(look.patience) else None

    def report(self, look: Look, severity: Severity) -> bool:
        """Takes in what a followed symptom came to; returns whether that is worth saying."""
        place = self._places[look.place]
        if not place.episode.report(severity):
            return False
        place.where = look.where
        return True

    def is_open(self, where: str) -> bool:
        """Whether a finding at ``where`` has not healed."""
        return any(p.episode.open and p.where == where for p in self._places.values())

    def ever_had(self, place: str) -> bool:
        """Whether the symptom was ever seen there."""
        return place in self._places and self._places[place].peak > 0.0

    def has_open(self, place: str) -> bool:
        """Whether a followed place has a finding that has not healed."""
        return place in self._places and self._places[place].episode.open

    def forget_idle(self) -> None:
        """Forgets the places without a symptom and without an open finding."""
        self._places = {k: p for k, p in self._places.items() if p.marks or p.episode.open}

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings, lists and dicts."""
        return {
            "progress": self._progress.state_dict(),
            "places": {name: place.state_dict() for name, place in self._places.items()},
            "step": self._step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self._progress.load_state_dict(state["progress"])
        self._places = {name: _Place.from_state(s) for name, s in state["places"].items()}
        self._step = state["step"]

    def reset(self) -> None:
        """Forgets everything."""
        self._progress.reset()
        self._places = {}
        self._step = None
        self._planned = 0

    def _never_better(self) -> bool:
        """Whether no loss of the last block was better than the first of the run.

        A run that blows up in its first steps has an early level that any later one is better than.
        """
        first = self._progress.first
        margin = self._thresholds.level_margin * first if first > 0.0 else 0.0
        return self._progress.lowest >= first - margin

    def _course(self, place: _Place, bad: bool) -> Course:
        progress, (_, strength, error, _) = self._progress, place.marks[-1]
        _, began, began_error, _ = place.marks[0]
        least = max(self._thresholds.recovery * began, math.hypot(began_error, error))
        return Course(
            since=place.marks[0][0] if place.since is None else place.since,
            inspections=len(place.marks),
            peak=place.peak,
            grown=strength - (strength if place.first is None else place.first),
            recovering=began - strength > least,
            known=self.knows_loss,
            bad=bad,
            harmful=bad and all(bad for *_, bad in place.marks),
            worse=progress.is_worse(),
            loss={"loss": progress.present, "early_loss": progress.start} if progress.ready else {},
        )
