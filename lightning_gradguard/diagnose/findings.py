"""The words of a diagnosis: what was found, how bad it is, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum, IntEnum
from typing import Any


class Pathology(str, Enum):
    """What can go wrong in a run. Each member is stored and printed as its plain value.

    In the order of causes: where several are found at once, an earlier one explains a later one.
    """

    NON_FINITE = "non_finite"
    UNDERFLOW = "underflow"
    DEAD_UNITS = "dead_units"
    SATURATED = "saturated"
    LAYER_NOT_TRAINING = "layer_not_training"
    VANISHING_IN_TIME = "vanishing_in_time"
    VANISHING_IN_DEPTH = "vanishing_in_depth"
    UPDATE_OUT_OF_RANGE = "update_out_of_range"
    EXPLODING = "exploding"
    DIVERGING = "diverging"
    LOSS_SPIKE = "loss_spike"
    OSCILLATING = "oscillating"
    STAGNATING = "stagnating"


class Severity(IntEnum):
    """How bad a finding is; only `WARNING` and above may cause a response."""

    INFO = 10
    WARNING = 20
    CRITICAL = 30

    @property
    def label(self) -> str:
        """The lower-case name, as written to files and loggers."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Severity:
        """Returns the severity with this label.

        Raises:
            ValueError: If no severity has this label.
        """
        for severity in cls:
            if severity.label == label:
                return severity
        raise ValueError(f"label must be one of {[s.label for s in cls]}, got {label!r}")


@dataclass(frozen=True)
class Remedy:
    """One thing to try.

    Attributes:
        sentence: What to do and why it helps.
        code: The line of code that does it.
        evidence: Where a measurement supports it: a heading of ``docs/remedies.md``, empty where
            none was made.
    """

    sentence: str
    code: str
    evidence: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with the run, in plain words and with its evidence.

    Attributes:
        pathology: What it is.
        severity: `INFO` for a symptom alone; higher where the loss shows that it does harm.
        where: Module path, or `"model"` or `"loss"`.
        step: Optimizer step at which it was found.
        evidence: Named finite numbers that the message rests on.
        message: One plain sentence.
        remedies: What to try, best first.
        timestep: Position in the sequence, where the finding has one.
        since: Step at which the symptom began, which may be before it was found.
        until: Step at which it had healed; ``None`` while it is open.
        fact: Whether it was read off the run and needs no judgement, as a NaN or a parameter that
            no optimizer has.
        follows_from: The open finding that explains this one, ``"vanishing_in_time in rnn"``; empty
            if none does.
        local: Whether it rests on what this rank alone has seen. Such a finding is for people and
            causes no response, as all ranks have to respond alike.

    Example:
        >>> finding = Finding(Pathology.LOSS_SPIKE, Severity.INFO, "loss", 7, {"z": 9.0}, "A jump")
        >>> Finding.from_dict(finding.to_dict()) == finding
        True
    """

    pathology: Pathology
    severity: Severity
    where: str
    step: int
    evidence: Mapping[str, float]
    message: str
    remedies: tuple[Remedy, ...] = ()
    timestep: int | None = None
    since: int | None = None
    until: int | None = None
    fact: bool = False
    follows_from: str = ""
    local: bool = False

    @property
    def cause(self) -> tuple[Pathology, str, bool]:
        """What it is about: of two findings with the same, one is the other as it has become."""
        return self.pathology, self.where, self.local

    @property
    def certainty(self) -> str:
        """How sure it is; docs/findings.md says how often each was right.

        ``"certain"`` for a fact; ``"likely"`` for a symptom that lasts beside a loss that shows
        harm; ``"possible"`` for a symptom alone.
        """
        if self.fact:
            return "certain"
        return "likely" if self.severity >= Severity.WARNING else "possible"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings, lists and dicts, ready for JSON or a checkpoint."""
        return {
            "pathology": self.pathology.value,
            "severity": self.severity.label,
            "where": self.where,
            "step": self.step,
            "evidence": dict(self.evidence),
            "message": self.message,
            "remedies": [asdict(remedy) for remedy in self.remedies],
            "timestep": self.timestep,
            "since": self.since,
            "until": self.until,
            "certainty": self.certainty,
            "fact": self.fact,
            "follows_from": self.follows_from,
            "local": self.local,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """Returns the finding that `to_dict` wrote.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If the pathology or the severity is unknown.
        """
        return cls(
            pathology=Pathology(data["pathology"]),
            severity=Severity.from_label(data["severity"]),
            where=data["where"],
            step=data["step"],
            evidence=dict(data["evidence"]),
            message=data["message"],
            remedies=tuple(Remedy(**remedy) for remedy in data["remedies"]),
            timestep=data["timestep"],
            since=data["since"],
            until=data["until"],
            fact=data["fact"],
            follows_from=data["follows_from"],
            local=data["local"],
        )
