"""Findings and actions as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gradguard.diagnose import Finding, Severity
from lightning_gradguard.diagnose.remedies import without_remedy
from lightning_gradguard.respond.actions import Action

# As many as the guard keeps of each.
MAX_ROWS = 1000

FINDING_COLUMNS = (
    "pathology",
    "severity",
    "certainty",
    "where",
    "step",
    "since",
    "until",
    "message",
    "remedy",
    "code",
    "optimizer",
)
ACTION_COLUMNS = ("step", "action", "message", "optimizer")


def with_finding(findings: Sequence[Finding], finding: Finding) -> list[Finding]:
    """Findings with one that is new, or that has changed since it stood among them.

    Example:
        >>> from lightning_gradguard.diagnose import Pathology
        >>> noted = Finding(Pathology.EXPLODING, Severity.INFO, "model", 5, {}, "It grows.")
        >>> worse = Finding(Pathology.EXPLODING, Severity.WARNING, "model", 9, {}, "It grows.")
        >>> [f.severity.label for f in with_finding([noted], worse)]
        ['warning']
    """
    kept = [known for known in findings if known.until is not None or known.cause != finding.cause]
    return [*kept, finding]


def finding_rows(findings: Mapping[str, Sequence[Finding]]) -> list[list[Any]]:
    """One row for each finding, what is open and severe first.

    Args:
        findings: Those of each optimizer by its label.
    """
    labelled = [(finding, label) for label, found in findings.items() for finding in found]
    labelled.sort(key=lambda item: (item[0].until is not None, -item[0].severity, item[0].step))
    return [_finding_row(finding, label) for finding, label in labelled[:MAX_ROWS]]


def action_rows(actions: Mapping[str, Sequence[Action]]) -> list[list[Any]]:
    """One row for each action, the newest first.

    Args:
        actions: Those of each optimizer by its label.
    """
    labelled = [(action, label) for label, taken in actions.items() for action in taken]
    labelled.sort(key=lambda item: -item[0].step)
    return [
        [action.step, action.kind.value, action.message, label]
        for action, label in labelled[:MAX_ROWS]
    ]


def worst_open(findings: Sequence[Finding]) -> Severity | None:
    """The highest severity among the findings that are open."""
    return max((f.severity for f in findings if f.until is None), default=None)


def _finding_row(finding: Finding, label: str) -> list[Any]:
    remedy = finding.remedies[0] if finding.remedies else None
    return [
        finding.pathology.value,
        finding.severity.label,
        finding.certainty,
        finding.where,
        finding.step,
        finding.since,
        finding.until,
        without_remedy(finding),
        remedy.sentence if remedy else "",
        remedy.code if remedy else "",
        label,
    ]
