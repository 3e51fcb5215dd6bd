"""Which findings stand by themselves, and which follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradguard.diagnose import Finding, Severity, by_cause


@dataclass(frozen=True)
class FindingGroup:
    """A cause and what it brings about.

    Attributes:
        cause: The finding that stands by itself.
        consequences: Those that follow from it, directly or by way of another.
    """

    cause: Finding
    consequences: tuple[Finding, ...] = ()

    @property
    def is_serious(self) -> bool:
        """Whether it is more than a note."""
        return self.cause.severity >= Severity.WARNING


def group_findings(findings: Sequence[Finding]) -> list[FindingGroup]:
    """Returns findings by cause, in the order in which they should be read, open ones first.

    Args:
        findings: Findings in any order. One whose cause is not among them stands by itself.
    """
    ordered = by_cause(findings)
    ordered.sort(key=lambda finding: finding.until is not None)  # keeps the order within both
    first: dict[str, Finding] = {}
    for finding in ordered:
        first.setdefault(name_of(finding), finding)
    members: dict[int, list[Finding]] = {}
    for finding in ordered:
        cause = _root(finding, first)
        if cause is not finding:
            members.setdefault(id(cause), []).append(finding)
    return [
        FindingGroup(finding, tuple(members.get(id(finding), ())))
        for finding in ordered
        if _root(finding, first) is finding
    ]


def name_of(finding: Finding) -> str:
    """A finding as `Finding.follows_from` names it."""
    return f"{finding.pathology.value} in {finding.where}"


def since_when(finding: Finding) -> str:
    """When it began and, if it has healed, when that was."""
    since = finding.since if finding.since is not None else finding.step
    if finding.until is None:
        return f"since step {since}"
    return f"steps {since}-{finding.until}, healed"


def _root(finding: Finding, first: dict[str, Finding]) -> Finding:
    seen = {id(finding)}
    cause = finding
    while cause.follows_from in first:
        above = first[cause.follows_from]
        if id(above) in seen:  # two that name each other: the one at hand stands by itself
            return finding
        seen.add(id(above))
        cause = above
    return cause
