"""One run and what every detector claimed of it, in one form for ours and for the peers'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.detection.records import Alarm, RunResult
from benchmarks.detection.replay import Warned, replay
from lightning_gradguard.diagnose import Finding, Severity, Thresholds, by_cause

OURS = "GradGuard"
FAILING, HEALTHY, AMBIGUOUS = "failing", "healthy", "ambiguous"
# Where a finding is about the run as a whole, it names no place.
_NO_PLACE = ("", "model", "loss")


@dataclass(frozen=True)
class Claim:
    """A detector says that something is wrong.

    Attributes:
        step: When it first said so. Of ours: when it first was a warning.
        cause: A value of `Pathology`, or empty.
        layer: Where; empty if it names no place.
        message: In words; ours only.
        certainty: ``"certain"``, ``"likely"`` or ``"possible"``; ours only.
        independent: Whether no other finding explains it.
    """

    step: int
    cause: str = ""
    layer: str = ""
    message: str = ""
    certainty: str = ""
    independent: bool = True


@dataclass
class JudgedRun:
    """A run without its observations.

    Attributes:
        program: Its name.
        family: Its family.
        seed: Its seed.
        steps: Budget.
        score: Figure of merit at the end.
        label: ``"failing"``, ``"healthy"`` or ``"ambiguous"``.
        causes: The right names, the label first.
        layers: The right places.
        onset: Step at which the fault sets in.
        claims: By detector, what it would say first comes first.
        notes: Our findings that are no warnings.
        seconds: Of each part.
        differs: Whether a replay of the observations found something else than the run itself.
    """

    program: str
    family: str
    seed: int
    steps: int
    score: float
    label: str
    causes: tuple[str, ...]
    layers: tuple[str, ...]
    onset: int
    claims: dict[str, list[Claim]]
    notes: list[Claim] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)
    differs: bool = False


def judge(result: RunResult, thresholds: Thresholds | None = None) -> JudgedRun:
    """Says what every detector claimed; ours is asked again, from the observations.

    Only a replay knows the step at which a finding became a warning: in its last state a finding
    bears the step at which it turned critical. Without observations that has to do.

    Args:
        result: The run.
        thresholds: Of our detectors; their defaults if not given.
    """
    if result.observations:
        ours = replay(result.observations, thresholds)
        differs = thresholds is None and _words(w.finding for w in ours) != _words(result.findings)
    else:
        ours = [
            Warned(f, f.step if f.severity >= Severity.WARNING else None) for f in result.findings
        ]
        differs = False
    serious, notes = claims_of(ours)
    claims = {OURS: serious}
    claims |= {name: _in_turn(alarms) for name, alarms in result.alarms.items()}
    return JudgedRun(
        program=result.program,
        family=result.family,
        seed=result.seed,
        steps=result.steps,
        score=result.score,
        label=result.label,
        causes=tuple(result.causes),
        layers=tuple(result.layers),
        onset=result.onset,
        claims=claims,
        notes=notes,
        seconds=dict(result.seconds),
        differs=differs,
    )


def claims_of(ours: Sequence[Warned]) -> tuple[list[Claim], list[Claim]]:
    """Our warnings in the order of causes, and the findings below them."""
    step_of = {id(warned.finding): warned.step for warned in ours}
    serious, notes = [], []
    for finding in by_cause(warned.finding for warned in ours):
        step = step_of[id(finding)]
        if step is None:
            notes.append(_claim(finding, finding.step))
        else:
            serious.append(_claim(finding, step))
    return serious, notes


def _claim(finding: Finding, step: int) -> Claim:
    return Claim(
        step=step,
        cause=finding.pathology.value,
        layer="" if finding.where in _NO_PLACE else finding.where,
        message=finding.message,
        certainty=finding.certainty,
        independent=not finding.follows_from,
    )


def _in_turn(alarms: Iterable[Alarm]) -> list[Claim]:
    return [Claim(a.step, a.cause, a.layer) for a in sorted(alarms, key=lambda a: a.step)]


def _words(findings: Iterable[Finding]) -> set[tuple[str, int, str, int]]:
    return {(f.pathology.value, int(f.severity), f.where, f.step) for f in findings}
