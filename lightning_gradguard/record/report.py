"""What happened, as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.respond.actions import Action, ActionKind

_MAX_LINES = 20


def format_report(
    findings: Sequence[Finding],
    actions: Sequence[Action],
    counts: dict[str, int],
    label: str = "",
) -> str:
    """A short plain-text report: a verdict, the findings with remedies, what was done.

    Args:
        findings: In the order in which they opened.
        actions: In the order in which they were taken.
        counts: Running counts by name.
        label: Name of the optimizer where there are several.
    """
    title = f"GradGuard report ({label})" if label else "GradGuard report"
    lines = [title, _verdict(findings, counts)]
    for finding in findings[:_MAX_LINES]:
        lines.append(f"  step {finding.step}: {finding.severity.label}: {finding.message}")
        lines += [f"    -> {remedy.sentence} `{remedy.code}`" for remedy in finding.remedies]
    if len(findings) > _MAX_LINES:
        lines.append(f"  ... and {len(findings) - _MAX_LINES} more findings in the event log")
    if actions:
        lines.append("What the guard did:")
        lines += [f"  {line}" for line in _action_lines(actions)]
    return "\n".join(lines)


def _verdict(findings: Sequence[Finding], counts: dict[str, int]) -> str:
    numbers = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items())
    state = "nothing found" if not findings else f"{len(findings)} finding(s)"
    return f"{state} ({numbers})"


def _action_lines(actions: Sequence[Action]) -> list[str]:
    """Every action, but a run of skips as one line."""
    lines: list[str] = []
    skips: list[Action] = []
    for action in actions:
        if action.kind is ActionKind.SKIP:
            skips.append(action)
            continue
        lines += _skip_line(skips)
        skips = []
        lines.append(f"step {action.step}: {action.message}")
    lines += _skip_line(skips)
    if len(lines) > _MAX_LINES:
        left_out = len(lines) - _MAX_LINES
        lines = [*lines[: _MAX_LINES // 2], f"... {left_out} more ...", *lines[-_MAX_LINES // 2 :]]
    return lines


def _skip_line(skips: Sequence[Action]) -> list[str]:
    if not skips:
        return []
    if len(skips) == 1:
        return [f"step {skips[0].step}: {skips[0].message}"]
    return [f"steps {skips[0].step}-{skips[-1].step}: {len(skips)} steps skipped"]
