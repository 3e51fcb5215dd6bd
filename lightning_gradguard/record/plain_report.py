"""A report as text of at most 100 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_gradguard.diagnose import Finding, Severity
from lightning_gradguard.diagnose.remedies import without_remedy
from lightning_gradguard.record.action_lines import action_lines
from lightning_gradguard.record.finding_groups import (
    FindingGroup,
    group_findings,
    name_of,
    since_when,
)
from lightning_gradguard.record.time_table import format_time_table

if TYPE_CHECKING:
    from lightning_gradguard.record.report import OptimizerReport

WIDTH = 100
MAX_GROUPS = 20
# Causes that are told in full; where there are many, the first ones are what to work on.
MAX_IN_FULL = 6
_MAX_CONSEQUENCES = 6
# A space between tokens of code, outside of quotes.
_TOKENS = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""")


def report_lines(part: OptimizerReport) -> list[str]:
    """A verdict, the findings by cause with numbers and remedies, what was done."""
    title = f"GradGuard report ({part.label})" if part.label else "GradGuard report"
    lines = [title, *_wrap(verdict(part), "")]
    groups = group_findings(part.findings)
    for group in groups[:MAX_IN_FULL]:
        lines += _group_lines(group)
    brief = groups[MAX_IN_FULL:MAX_GROUPS]
    lines += (
        ["", *(text for g in brief for text in _wrap(head(g.cause), "", "  "))] if brief else []
    )
    if len(groups) > MAX_GROUPS:
        lines.append(f"... and {len(groups) - MAX_GROUPS} more findings in the event log")
    if part.actions:
        lines += ["", "What the guard did:"]
        lines += [text for line in action_lines(part.actions) for text in _wrap(line, "  ")]
    if part.time:
        lines += ["", "How far the gradient reaches back through time:"]
        lines += [f"  {line}" for line in format_time_table(part.time, dated=True).splitlines()]
    return lines


def verdict(part: OptimizerReport) -> str:
    """How many findings of which kind in how many steps, and what was done to steps."""
    counts = part.counts or {}
    done = [
        f"{count} {name.removesuffix('_steps')}"
        for name, count in counts.items()
        if name.endswith("_steps") and count
    ]
    steps = f"{counts['steps']} steps" if "steps" in counts else "the run"
    touched = ", ".join(done) if done else "no step was touched"
    return f"{_count(part.findings)} in {steps}; {touched}."


def head(finding: Finding) -> str:
    """Severity, name, certainty and time of a finding."""
    label = finding.severity.label
    label = label.upper() if finding.severity >= Severity.WARNING else label
    return f"{label}: {name_of(finding)}, {finding.certainty}, {since_when(finding)}"


def numbers_in_words(evidence: Mapping[str, float]) -> str:
    """Named numbers, as short as they stay readable."""
    return ", ".join(f"{name} {value:.4g}" for name, value in evidence.items())


def wrapped_code(code: str, width: int) -> list[str]:
    """A line of code in several, which together mean the same to Python.

    Example:
        >>> wrapped_code("first = 'a b'; second('c')", 24)[1]
        "    second('c')"
    """
    lines = [""]
    for token in _TOKENS.findall(code):
        start = lines[-1]
        if start.strip() and len(start) + len(token) + 3 > width:
            lines[-1] = f"{start} \\"
            lines.append(f"    {token}")
        else:
            lines[-1] = f"{start} {token}" if start else token
    return lines


def _count(findings: Sequence[Finding]) -> str:
    if not findings:
        return "No finding"
    parts = []
    for severity in sorted(Severity, reverse=True):
        count = sum(finding.severity is severity for finding in findings)
        if count:
            parts.append(f"{count} {severity.label}")
    healed = sum(finding.until is not None for finding in findings)
    total = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"
    return f"{total} ({', '.join(parts)}{f'; {healed} healed' if healed else ''})"


def _group_lines(group: FindingGroup) -> Iterator[str]:
    finding = group.cause
    yield ""
    if group.is_serious:
        yield from _serious_lines(finding)
    else:  # what is harmless needs no more than its sentence
        yield from _wrap(f"info: {finding.message} ({since_when(finding)})", "", "  ")
    for consequence in group.consequences[:_MAX_CONSEQUENCES]:
        text = f"brings about: {name_of(consequence)}, {consequence.severity.label}"
        yield from _wrap(f"{text}, {since_when(consequence)}", "  ", "    ")
    left_out = len(group.consequences) - _MAX_CONSEQUENCES
    if left_out > 0:
        yield f"  and {left_out} more"


def _serious_lines(finding: Finding) -> Iterator[str]:
    yield from _wrap(head(finding), "", "  ")
    yield from _wrap(without_remedy(finding), "  ")
    if finding.evidence:
        yield from _wrap(numbers_in_words(finding.evidence), "  ")
    for remedy in finding.remedies:
        yield from _wrap(f"-> {remedy.sentence}", "  ", "     ")
        for line in wrapped_code(remedy.code, WIDTH - 7):
            yield f"       {line}"
        if remedy.evidence:
            yield f"     measured: {remedy.evidence}"


def _wrap(text: str, first: str, later: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=first if later is None else later,
        break_on_hyphens=False,
    )
