"""What happened, as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from lightning_gradguard.diagnose import Finding, Severity
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.time_table import format_time_table
from lightning_gradguard.respond.actions import Action, ActionKind

_MAX_LINES = 20


def format_report(
    findings: Sequence[Finding],
    actions: Sequence[Action],
    counts: dict[str, int],
    label: str = "",
    time: Sequence[TimeReading] = (),
) -> str:
    """A short plain-text report: a verdict, the findings with remedies, what was done.

    Args:
        findings: In the order in which they opened.
        actions: In the order in which they were taken.
        counts: Running counts by name.
        label: Name of the optimizer where there are several.
        time: The newest readings through time.
    """
    title = f"GradGuard report ({label})" if label else "GradGuard report"
    lines = [title, _verdict(findings, counts)]
    for finding in findings[:_MAX_LINES]:
        lines.append(f"  step {finding.step}: {finding.severity.label}: {finding.message}")
        if finding.severity >= Severity.WARNING:  # what is harmless needs no remedy
            lines += [f"    -> {remedy.sentence} `{remedy.code}`" for remedy in finding.remedies]
    if len(findings) > _MAX_LINES:
        lines.append(f"  ... and {len(findings) - _MAX_LINES} more findings in the event log")
    if actions:
        lines.append("What the guard did:")
        lines += [f"  {line}" for line in action_lines(actions)]
    if time:
        lines.append("How far the gradient reaches back through time:")
        lines += [f"  {line}" for line in format_time_table(time, dated=True).splitlines()]
    return "\n".join(lines)


def _verdict(findings: Sequence[Finding], counts: dict[str, int]) -> str:
    state = "No finding" if not findings else f"{len(findings)} finding(s)"
    done = [
        f"{count} {name.removesuffix('_steps')}"
        for name, count in counts.items()
        if name.endswith("_steps") and count
    ]
    steps = f"{counts['steps']} steps" if "steps" in counts else "the run"
    return f"{state} in {steps}; {', '.join(done) if done else 'no step was touched'}."


def action_lines(actions: Sequence[Action]) -> list[str]:
    """What was done and when, one line each, a series of one kind as one line.

    Args:
        actions: In the order in which they were taken.
    """
    lines: list[str] = []
    for kind, series in groupby(actions, key=lambda action: action.kind):
        members = list(series)
        if len(members) == 1:
            lines.append(f"step {members[0].step}: {members[0].message}")
        else:
            lines.append(_series_line(kind, members))
    if len(lines) > _MAX_LINES:
        left_out = len(lines) - _MAX_LINES
        lines = [*lines[: _MAX_LINES // 2], f"... {left_out} more ...", *lines[-_MAX_LINES // 2 :]]
    return lines


def _series_line(kind: ActionKind, actions: Sequence[Action]) -> str:
    """What a series of actions of one kind amounted to; the last message tells why."""
    where = f"steps {actions[0].step}-{actions[-1].step}"
    if kind is ActionKind.SKIP:
        return f"{where}: {len(actions)} steps skipped"
    numbers = [next(iter(action.numbers.values()), math.nan) for action in actions]
    values = ", ".join(f"{number:.3g}" for number in numbers)
    name = next(iter(actions[-1].numbers), kind.value)
    return f"{where}: {len(actions)} times, {name} {values}. Last: {actions[-1].message}"
