"""A report as tables in a terminal; the only file that imports rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_gradguard.diagnose import Finding, Severity
from lightning_gradguard.diagnose.remedies import without_remedy
from lightning_gradguard.record.action_lines import action_lines
from lightning_gradguard.record.finding_groups import (
    FindingGroup,
    group_findings,
    name_of,
    since_when,
)
from lightning_gradguard.record.plain_report import (
    MAX_GROUPS,
    MAX_IN_FULL,
    numbers_in_words,
    verdict,
)
from lightning_gradguard.record.time_table import format_time_table

if TYPE_CHECKING:
    from lightning_gradguard.record.report import OptimizerReport, Report

_STYLES = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}


def render(report: Report) -> RenderableType:
    """One panel for each optimizer."""
    return Group(*(_panel(part) for part in report.optimizers))


def _panel(part: OptimizerReport) -> Panel:
    groups = group_findings(part.findings)
    shown: list[RenderableType] = [Text(verdict(part))]
    if groups:
        shown.append(_table(groups[:MAX_GROUPS]))
    if len(groups) > MAX_GROUPS:
        shown.append(Text(f"... and {len(groups) - MAX_GROUPS} more findings in the event log"))
    if part.actions:
        shown += [
            Text("\nWhat the guard did", style="bold"),
            Text("\n".join(action_lines(part.actions))),
        ]
    if part.time:
        table = format_time_table(part.time, dated=True)
        shown += [
            Text("\nHow far the gradient reaches back through time", style="bold"),
            Text(table, no_wrap=True),
        ]
    label = f" ({part.label})" if part.label else ""
    return Panel(Group(*shown), title=Text(f"GradGuard report{label}"))


def _table(groups: list[FindingGroup]) -> Table:
    table = Table(expand=True, show_lines=True)
    table.add_column("finding", ratio=1, min_width=16)
    table.add_column("what and what to do", ratio=4)
    for number, group in enumerate(groups):
        body = _body(group) if number < MAX_IN_FULL else Text(without_remedy(group.cause))
        table.add_row(_head(group.cause), body)
    return table


def _head(finding: Finding) -> Text:
    text = Text(finding.severity.label, style=_STYLES[finding.severity])
    text.append(f"\n{name_of(finding)}", style="bold")
    text.append(f"\n{finding.certainty}\n{since_when(finding)}", style="dim")
    return text


def _body(group: FindingGroup) -> Text:
    if not group.is_serious:
        text = Text(group.cause.message)
    else:
        text = Text("\n").join(_serious(group.cause))
    for consequence in group.consequences:
        label = consequence.severity.label
        text.append("\nbrings about: ", style="dim")
        text.append(f"{name_of(consequence)}, {label}, {since_when(consequence)}")
    return text


def _serious(finding: Finding) -> Iterator[Text]:
    yield Text(without_remedy(finding))
    if finding.evidence:
        yield Text(numbers_in_words(finding.evidence), style="dim")
    for remedy in finding.remedies:
        yield Text(f"-> {remedy.sentence}", style="green")
        yield Text(f"   {remedy.code}", style="bold")
        if remedy.evidence:
            yield Text(f"   measured: {remedy.evidence}", style="dim")
