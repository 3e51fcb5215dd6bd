"""The words of a diagnosis: what was found, how bad it is, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Protocol

from lightning_gradguard.readings import TimeReading


class Pathology(str, Enum):
    """What can go wrong in a run. Each member is stored and printed as its plain value."""

    NON_FINITE = "non_finite"
    EXPLODING = "exploding"
    LOSS_SPIKE = "loss_spike"
    DIVERGING = "diverging"
    VANISHING_IN_TIME = "vanishing_in_time"


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
    """

    sentence: str
    code: str


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

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings, lists and dicts, ready for JSON or a checkpoint."""
        return {
            "pathology": self.pathology.value,
            "severity": self.severity.label,
            "where": self.where,
            "step": self.step,
            "evidence": dict(self.evidence),
            "message": self.message,
            "remedies": [{"sentence": r.sentence, "code": r.code} for r in self.remedies],
            "timestep": self.timestep,
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
            remedies=tuple(Remedy(r["sentence"], r["code"]) for r in data["remedies"]),
            timestep=data["timestep"],
        )


@dataclass(frozen=True)
class Observation:
    """What is known about one optimizer step.

    Attributes:
        step: Number of the optimizer step.
        loss: Training loss, `None` where it is not known; may be negative, NaN or infinite.
        total_norm: L2 norm of all gradients before any clipping; may be NaN or infinite.
        norms: L2 norm per parameter name in forward order, on steps where they were read.
        time: How the gradient travels through time, one reading per module or per layer and
            direction of it, on steps where it was measured; empty on all others.
    """

    step: int
    loss: float | None
    total_norm: float
    norms: Mapping[str, float] | None = None
    time: tuple[TimeReading, ...] = ()


class Detector(Protocol):
    """Looks at one observation after another and reports what is wrong.

    A finding is returned once, when it opens, and again only if the same episode turns more
    severe. The detector re-arms when the symptom has been gone for `Thresholds.heal_steps` steps.
    """

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step and returns what became known with it."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers, strings, lists and dicts."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state, after which the detector continues bit for bit."""

    def reset(self) -> None:
        """Forgets everything."""


class TimeDetector(Detector, Protocol):
    """A detector of readings through time, which come only now and then.

    Its findings are for people and cause no response: every rank reads its own sequences.
    """

    @property
    def wants_exact(self) -> bool:
        """Whether another exact reading, now, would help to decide."""
