"""All detectors together: one finding per cause, which opens, turns worse and heals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_gradguard.diagnose.detector import Detector, Observation
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.remedies import with_remedies

# What each pathology brings about: while the first is open, the others are its consequences.
_EXPLAINS = {
    Pathology.NON_FINITE: frozenset(Pathology) - {Pathology.NON_FINITE},
    Pathology.LAYER_NOT_TRAINING: frozenset({Pathology.STAGNATING}),
    Pathology.UNDERFLOW: frozenset(
        {
            Pathology.LAYER_NOT_TRAINING,
            Pathology.VANISHING_IN_TIME,
            Pathology.VANISHING_IN_DEPTH,
            Pathology.UPDATE_OUT_OF_RANGE,
            Pathology.STAGNATING,
        }
    ),
    Pathology.DEAD_UNITS: frozenset(
        {
            Pathology.LAYER_NOT_TRAINING,
            Pathology.VANISHING_IN_TIME,
            Pathology.VANISHING_IN_DEPTH,
            Pathology.UPDATE_OUT_OF_RANGE,
            Pathology.STAGNATING,
        }
    ),
    Pathology.SATURATED: frozenset(
        {
            Pathology.LAYER_NOT_TRAINING,
            Pathology.VANISHING_IN_TIME,
            Pathology.VANISHING_IN_DEPTH,
            Pathology.UPDATE_OUT_OF_RANGE,
            Pathology.STAGNATING,
        }
    ),
    Pathology.VANISHING_IN_TIME: frozenset({Pathology.STAGNATING}),
    Pathology.VANISHING_IN_DEPTH: frozenset({Pathology.UPDATE_OUT_OF_RANGE, Pathology.STAGNATING}),
    Pathology.UPDATE_OUT_OF_RANGE: frozenset(
        {Pathology.DIVERGING, Pathology.LOSS_SPIKE, Pathology.OSCILLATING, Pathology.STAGNATING}
    ),
    Pathology.EXPLODING: frozenset(
        {Pathology.DIVERGING, Pathology.LOSS_SPIKE, Pathology.OSCILLATING, Pathology.STAGNATING}
    ),
    Pathology.DIVERGING: frozenset(
        {Pathology.LOSS_SPIKE, Pathology.OSCILLATING, Pathology.STAGNATING}
    ),
    Pathology.OSCILLATING: frozenset({Pathology.STAGNATING}),
}


# A run that has blown up leaves these behind: of the ones that came later it is the cause.
_BLOWN_UP = frozenset(
    {
        Pathology.UPDATE_OUT_OF_RANGE,
        Pathology.EXPLODING,
        Pathology.DIVERGING,
        Pathology.LOSS_SPIKE,
        Pathology.OSCILLATING,
    }
)
_WRECKAGE = frozenset(
    {
        Pathology.DEAD_UNITS,
        Pathology.SATURATED,
        Pathology.LAYER_NOT_TRAINING,
        Pathology.VANISHING_IN_TIME,
        Pathology.VANISHING_IN_DEPTH,
    }
)

# These rest on the loss alone.
_OF_THE_LOSS = frozenset(
    {Pathology.DIVERGING, Pathology.LOSS_SPIKE, Pathology.OSCILLATING, Pathology.STAGNATING}
)

# Detector, pathology, place.
_Key = tuple[int, Pathology, str]


class Diagnosis:
    """Runs detectors over the steps of a run and keeps one finding per cause.

    A finding comes out of :meth:`observe` when it opens, again when it turns more severe, and once
    more, with `Finding.until`, when it has healed.

    Args:
        detectors: Those whose findings may cause a response.
        local_detectors: Those that judge what this rank alone has seen, see `Finding.local`.

    Example:
        >>> from lightning_gradguard.diagnose import Observation, default_detectors
        >>> diagnosis = Diagnosis(default_detectors())
        >>> [f.pathology.value for f in diagnosis.observe(Observation(0, float("nan"), 1.0))]
        ['non_finite']
        >>> healed = [f for s in range(1, 40) for f in diagnosis.observe(Observation(s, 1.0, 1.0))]
        >>> [(f.pathology.value, f.since, f.until) for f in healed]
        [('non_finite', 0, 16)]
    """

    def __init__(
        self, detectors: Sequence[Detector], local_detectors: Sequence[Detector] = ()
    ) -> None:
        self.detectors = (*detectors, *local_detectors)
        self._first_local = len(detectors)
        self._open: dict[_Key, Finding] = {}

    @property
    def open(self) -> list[Finding]:
        """Findings that have not healed, the cause before what it brings about."""
        return by_cause(self._open.values())

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; returns the findings that opened, changed or healed with it."""
        changed: dict[_Key, Finding] = {}
        for number, detector in enumerate(self.detectors):
            for finding in detector.observe(observation):
                key = (number, finding.pathology, finding.where)
                changed[key] = self._enter(key, finding, observation)
        healed = self._close(observation.step) if self._open else {}
        changed |= healed
        if changed:
            changed |= self._link()
        return list(changed.values())

    def _enter(self, key: _Key, finding: Finding, observation: Observation) -> Finding:
        before = self._open.get(key)
        since = finding.since if finding.since is not None else finding.step
        if before is not None and before.since is not None:
            since = min(since, before.since)
        model = observation.model
        if observation.lr > model.lr:  # raised beyond what was set at first
            model = replace(model, lr=observation.lr)
        if model.optimizers > 1 and finding.pathology in _OF_THE_LOSS:
            finding = replace(finding, severity=Severity.INFO)
        finding = replace(
            with_remedies(finding, model),
            since=since,
            local=key[0] >= self._first_local,
        )
        self._open[key] = finding
        return finding

    def _link(self) -> dict[_Key, Finding]:
        """Says of each open finding which other explains it; returns those that were told."""
        told = {}
        for key, finding in self._open.items():
            cause = self._cause_of(finding)
            # A cause that has healed since was the cause all the same; but a NaN that is over has
            # nothing to do with what lasts.
            over = finding.follows_from.startswith(Pathology.NON_FINITE.value)
            if cause != finding.follows_from and (cause or over):
                told[key] = replace(finding, follows_from=cause)
        self._open |= told
        return {key: self._open[key] for key in told}

    def _cause_of(self, finding: Finding) -> str:
        for cause in self.open:
            if cause.severity >= Severity.WARNING and _explains(cause, finding):
                return f"{cause.pathology.value} in {cause.where}"
        return ""

    def _close(self, step: int) -> dict[_Key, Finding]:
        healed = [
            key
            for key, finding in self._open.items()
            if not self.detectors[key[0]].is_open(finding.where)
        ]
        return {key: replace(self._open.pop(key), until=step) for key in healed}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers, strings, lists and dicts."""
        return {
            "detectors": {type(d).__name__: d.state_dict() for d in self.detectors},
            "open": [
                [type(self.detectors[number]).__name__, finding.to_dict()]
                for (number, _, _), finding in self._open.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; a detector that was not in use then starts afresh."""
        numbers = {type(d).__name__: number for number, d in enumerate(self.detectors)}
        for name, number in numbers.items():
            if name in state["detectors"]:
                self.detectors[number].load_state_dict(state["detectors"][name])
        self._open = {}
        for name, values in state["open"]:
            if name in numbers:
                finding = Finding.from_dict(values)
                self._open[numbers[name], finding.pathology, finding.where] = finding

    def reset(self) -> None:
        """Forgets everything."""
        for detector in self.detectors:
            detector.reset()
        self._open = {}


def _explains(cause: Finding, finding: Finding) -> bool:
    began, later = _begin(cause), _begin(finding)
    if finding.fact and cause.pathology is not Pathology.NON_FINITE:
        return False
    if cause.pathology in _BLOWN_UP and finding.pathology in _WRECKAGE:
        return began < later
    return began <= later and finding.pathology in _EXPLAINS.get(cause.pathology, ())


def _begin(finding: Finding) -> int:
    return finding.step if finding.since is None else finding.since


def by_cause(findings: Iterable[Finding]) -> list[Finding]:
    """Returns findings in the order in which they should be read.

    Serious before harmless, what stands by itself before what follows from another, what lasts
    before what healed, a fact before a judgement, a cause before what it brings about, then by
    step.

    Args:
        findings: Findings in any order.

    Example:
        >>> stuck = Finding(Pathology.STAGNATING, Severity.WARNING, "loss", 300, {}, "")
        >>> short = Finding(Pathology.VANISHING_IN_TIME, Severity.WARNING, "rnn", 350, {}, "")
        >>> by_cause([stuck, short])[0].where
        'rnn'
    """
    order = list(Pathology)
    return sorted(
        findings,
        key=lambda f: (
            f.severity < Severity.WARNING,
            bool(f.follows_from),
            f.until is not None,
            not f.fact,
            order.index(f.pathology),
            f.step,
        ),
    )
