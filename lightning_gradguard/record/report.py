"""What happened, for people and for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.plain_report import report_lines
from lightning_gradguard.record.plain_values import plain_values
from lightning_gradguard.record.recorder import Recorder
from lightning_gradguard.respond.actions import Action

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class OptimizerReport:
    """What happened to one optimizer.

    Attributes:
        findings: In the order in which they opened.
        actions: In the order in which they were taken.
        counts: Running counts by name.
        label: Name of the optimizer where there are several.
        time: The newest readings through time.
    """

    findings: tuple[Finding, ...] = ()
    actions: tuple[Action, ...] = ()
    counts: Mapping[str, int] | None = None
    label: str = ""
    time: tuple[TimeReading, ...] = ()

    @classmethod
    def of(cls, recorder: Recorder, counts: Mapping[str, int]) -> OptimizerReport:
        """What a recorder has kept."""
        return cls(
            tuple(recorder.findings),
            tuple(recorder.actions),
            dict(counts),
            recorder.label,
            tuple(recorder.latest_readings),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; NaN and infinities may be among them."""
        return {
            "optimizer": self.label,
            "counts": dict(self.counts or {}),
            "findings": [finding.to_dict() for finding in self.findings],
            "actions": [action.to_dict() for action in self.actions],
            "time": [reading.to_dict() for reading in self.time],
        }


@dataclass(frozen=True)
class Report:
    """What was found, what to do about it and what the guard did.

    ``print(report)`` shows text of at most 100 columns; :meth:`print` and rich's own ``print`` show
    a table where rich is installed; :meth:`to_dict` and :meth:`to_json` hold the same as data.

    Args:
        optimizers: One part for each optimizer.

    Example:
        >>> report = Report((OptimizerReport(counts={"steps": 600}),))
        >>> print(report)
        GradGuard report
        No finding in 600 steps; no step was touched.
        >>> report.findings
        []
    """

    optimizers: tuple[OptimizerReport, ...]

    @property
    def findings(self) -> list[Finding]:
        """All findings, in order of their steps."""
        found = [finding for part in self.optimizers for finding in part.findings]
        return sorted(found, key=lambda finding: finding.step)

    def __str__(self) -> str:
        if not self.optimizers:
            return "GradGuard report\nNothing was trained."
        return "\n\n".join("\n".join(report_lines(part)) for part in self.optimizers)

    def __rich__(self) -> RenderableType:
        from lightning_gradguard.record.rich_report import render

        return render(self)

    def print(self, file: TextIO | None = None) -> None:
        """Print it, as a table if rich is installed.

        Args:
            file: Where to; the standard output if not given.
        """
        try:
            from rich.console import Console
        except ImportError:
            (file or sys.stdout).write(f"{self}\n")
        else:
            Console(file=file).print(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; NaN and infinities as strings, as in the log."""
        values: dict[str, Any] = plain_values(
            {"optimizers": [part.to_dict() for part in self.optimizers]}
        )
        return values

    def to_json(self, indent: int | None = 2) -> str:
        """The same as JSON text.

        Args:
            indent: Spaces of each level; ``None`` for one line.
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)
