"""The parts of the screen of ``gradguard watch``, as lines; imports rich."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from lightning_gradguard.cli.chart import Chart, Floats, columns_of, draw
from lightning_gradguard.cli.step_rows import last_rows
from lightning_gradguard.cli.words import count_words, number
from lightning_gradguard.diagnose import Severity
from lightning_gradguard.record import action_lines
from lightning_gradguard.record.finding_groups import (
    FindingGroup,
    group_findings,
    name_of,
    since_when,
)
from lightning_gradguard.record.guard_state import guard_state
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory
from lightning_gradguard.record.time_table import format_time_table

_STYLES = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}
_STATES = {"ok": "green", "watching": "green", "starting": "dim", "skipping": "red"}
_CALM, _CLIPPED, _SKIPPED, _LOSS = "green", "yellow", "red", "blue"
# What stands left and right of a chart.
_LEFT, _RIGHT = 12, 10
_INDENT = 11


@dataclass(frozen=True)
class Section:
    """A part that is as long as there is room for.

    Attributes:
        title: Of its rule.
        lines: Below it.
    """

    title: Text
    lines: list[Text]


def rule(title: Text, width: int) -> Text:
    """A title in a line across the screen."""
    line = Text.assemble(("── ", "dim"), title, " ")
    return line.append("─" * max(width - line.cell_len, 0), "dim")


def course(part: OptimizerHistory, width: int, tall: int, *, protecting: bool) -> list[Text]:
    """Loss and gradient norm of the last steps, and what the guard makes of them.

    Args:
        part: With its last steps.
        width: Columns of the screen.
        tall: Lines of each chart, at least two.
        protecting: Whether the guard may respond.
    """
    steps = part.steps
    label = f"{part.label}: " if part.label else ""
    if not len(steps["step"]):
        return [rule(Text(f"{label}no step yet", "bold"), width)]
    inner = max(width - _LEFT - _RIGHT, 1)
    styles = _column_styles(steps, inner)
    span = f"{label}steps {steps['step'][0]:,.0f} to {steps['step'][-1]:,.0f}"
    title = Text(span, "bold")
    for style, name in ((_CLIPPED, "clipped"), (_SKIPPED, "skipped")):
        if style in styles:
            title.append("  ").append("█", style).append(f" {name}", "not bold dim")
    loss, norm = steps["loss"], steps["total_norm"]
    shown = np.where(np.isnan(norm), np.inf, norm)  # not finite, and not a gap
    return [
        rule(title, width),
        *_chart("loss", loss, draw(loss, inner, tall), [_LOSS] * inner),
        *_chart("grad norm", norm, draw(shown, inner, tall, log=True), styles),
        _guard(part, protecting=protecting),
    ]


def _column_styles(steps: Mapping[str, Floats], width: int) -> list[str]:
    def style(column: slice) -> str:
        if (steps["skipped"][column] > 0.0).any():
            return _SKIPPED
        return _CLIPPED if (steps["clip_coef"][column] < 1.0).any() else _CALM

    return [style(column) for column in columns_of(len(steps["step"]), width)]


def _chart(name: str, values: Floats, chart: Chart, styles: list[str]) -> Iterator[Text]:
    left = [f" {name}", f" {number(values[-1])}"]
    right = {0: number(chart.high), len(chart.lines) - 1: number(chart.low)}
    for place, columns in enumerate(chart.lines):
        head = left[place] if place < len(left) else ""
        line = Text(head.ljust(_LEFT), "bold" if place == 1 else "")
        for column, style in zip(columns, styles, strict=False):
            line.append(column, style)
        line.pad_right(max(len(styles) - len(columns), 0))
        yield line.append(f" {right.get(place, '')}", "dim")


def _guard(part: OptimizerHistory, *, protecting: bool) -> Text:
    state = guard_state(last_rows(part.steps), protecting=protecting)
    threshold = part.steps["clip_threshold"][-1]
    words = [f"clip threshold {number(threshold)}"] if np.isfinite(threshold) else []
    done = count_words(part.counts)
    words += [done] if done else []
    line = Text(" guard".ljust(_LEFT))
    line.append(state, f"bold {_STATES.get(state, 'yellow')}")
    return line.append("".join(f" · {word}" for word in words))


def findings_open(run: RunHistory, width: int) -> Section:
    """What is wrong now, causes first."""
    lines: list[Text] = []
    healed = 0
    for part in run.optimizers:
        now = [finding for finding in part.findings if finding.until is None]
        healed += len(part.findings) - len(now)
        label = f"[{part.label}] " if part.label else ""
        for group in group_findings(now):
            lines += _group(group, label, width)
    known = len(run.findings) - healed
    title = Text("findings", "bold").append(f"  {known} open, {healed} healed", "not bold dim")
    return Section(title, lines or [Text(" none" if not healed else " none any more", "dim")])


def _group(group: FindingGroup, label: str, width: int) -> Iterator[Text]:
    finding = group.cause
    line = Text(f" {finding.severity.label}".ljust(_INDENT), _STYLES[finding.severity])
    line.append(f"{label}{name_of(finding)}", "bold not dim")
    yield line.append(f"  {since_when(finding)}", "not bold dim")
    for text in textwrap.wrap(finding.message, max(width - _INDENT - 1, 20)):
        yield Text(" " * _INDENT + text)
    for consequence in group.consequences:
        text = f"brings about: {name_of(consequence)}, {consequence.severity.label}"
        yield Text(" " * _INDENT + text, "dim")


def actions_taken(run: RunHistory) -> Section:
    """What the guard did, the latest first."""
    lines: list[Text] = []
    for part in run.optimizers:
        label = f"[{part.label}] " if part.label else ""
        lines += [Text(f" {label}{line}") for line in reversed(action_lines(part.actions))]
    return Section(Text("actions", "bold").append("  latest first", "not bold dim"), lines)


def ways_through_time(run: RunHistory) -> Section:
    """How far the gradient reaches back through time, for each module."""
    readings = [reading for part in run.optimizers for reading in part.latest_times]
    table = format_time_table(readings).splitlines() if readings else []
    lines = [Text(f" {line}", "dim" if not place else "") for place, line in enumerate(table)]
    return Section(Text("gradient through time", "bold"), lines)
