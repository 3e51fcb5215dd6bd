"""What a report says and draws, ready to be laid out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_gradguard.record.action_lines import action_lines
from lightning_gradguard.record.finding_groups import FindingGroup, group_findings
from lightning_gradguard.record.html_report.charts import Chart
from lightning_gradguard.record.html_report.comparison import (
    Comparison,
    compare_runs,
    flat_settings,
    numbers_of,
    optimizer_words,
    twin_of,
)
from lightning_gradguard.record.html_report.heat_maps import has_cells, layer_maps
from lightning_gradguard.record.html_report.layer_table import LayerRow, layer_rows
from lightning_gradguard.record.html_report.step_charts import step_charts
from lightning_gradguard.record.html_report.time_charts import drawn_readings, time_charts
from lightning_gradguard.record.html_report.words import (
    part_verdict,
    steps_taken,
    verdict,
    worst,
)
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory
from lightning_gradguard.record.time_table import TABLE_HEADER, table_row

# Of all heat maps together, one byte each: with plotly.js, the page stays below 5 MB.
MAX_CELLS = 1_400_000


@dataclass(frozen=True)
class TimeSection:
    """How the gradient travels through time in the modules of one optimizer.

    Attributes:
        header: Names of the table's columns.
        rows: One for each module, layer and direction.
        notes: What could not be measured, and why.
        modules: Names and charts of those that are drawn.
    """

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]
    modules: list[tuple[str, list[Chart]]]


@dataclass(frozen=True)
class OptimizerSection:
    """All of one optimizer.

    Attributes:
        key: Begins the ids of what is in it.
        title: Its name; empty where it is the only one.
        verdict: What came of it, in one sentence.
        figures: Its numbers, by name.
        groups: Findings by cause.
        actions: What was done, a line each.
        steps: Charts over the steps.
        layers: Heat maps of the layers.
        time: How the gradient travels through time; ``None`` if nothing was measured.
        rows: Of the table of layers.
        layer_count: How many layers there are, which may be more than rows.
    """

    key: str
    title: str
    verdict: str
    figures: dict[str, str]
    groups: list[FindingGroup]
    actions: list[str]
    steps: list[Chart]
    layers: list[Chart]
    time: TimeSection | None
    rows: list[LayerRow]
    layer_count: int

    @property
    def charts(self) -> list[Chart]:
        """All of its charts."""
        modules = self.time.modules if self.time else []
        return [*self.steps, *self.layers, *(chart for _, charts in modules for chart in charts)]


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        name: Of the run.
        tone: How it went: ``"good"``, a severity's label, or ``"critical"`` for one that failed.
        verdict: What came of the run, in one sentence.
        facts: What the run is, by name.
        settings: The guard's, one level deep.
        sections: One for each optimizer.
        comparison: With another run, if there is one.
    """

    name: str
    tone: str
    verdict: str
    facts: dict[str, str]
    settings: dict[str, str]
    sections: list[OptimizerSection]
    comparison: Comparison | None

    @property
    def figures(self) -> dict[str, Any]:
        """What plotly draws, by the id of the chart."""
        return {chart.key: chart.figure for part in self.sections for chart in part.charts}


def make_page(run: RunHistory, compare: RunHistory | None = None) -> Page:
    """All that is said and drawn of a run, and of what changed since another one."""
    maps = sum(_map_count(part) for part in run.optimizers)
    cells = MAX_CELLS // max(1, maps)
    name = (compare.info.name or "the other run") if compare else ""
    return Page(
        name=run.info.name or "A run without a name",
        tone="critical" if run.info.status == "failed" else worst(run.findings),
        verdict=verdict(run),
        facts=dict(_facts(run)),
        settings=flat_settings(run.info.settings),
        sections=[
            _section(f"optimizer-{at}", part, twin_of(part, run, compare), name, cells)
            for at, part in enumerate(run.optimizers)
        ],
        comparison=compare_runs(run, compare) if compare else None,
    )


def _section(
    key: str,
    part: OptimizerHistory,
    other: OptimizerHistory | None,
    name: str,
    cells: int,
) -> OptimizerSection:
    return OptimizerSection(
        key=key,
        title=part.label,
        verdict=part_verdict(part),
        figures=numbers_of(part) if steps_taken(part) else {},
        groups=group_findings(part.findings),
        actions=action_lines(part.actions),
        steps=step_charts(key, part, other, name),
        layers=layer_maps(key, part, cells),
        time=_time_section(key, part, cells) if part.times else None,
        rows=layer_rows(part),
        layer_count=len(part.layers.names),
    )


def _time_section(key: str, part: OptimizerHistory, cells: int) -> TimeSection:
    latest = part.latest_times
    return TimeSection(
        header=(*TABLE_HEADER, "at step"),
        rows=[(*table_row(reading), f"{reading.step:,}") for reading in latest],
        notes=[f"{reading.name}: {reading.note}" for reading in latest if reading.note],
        modules=time_charts(key, part, cells),
    )


def _map_count(part: OptimizerHistory) -> int:
    return has_cells(part.layers) + has_cells(part.updates) + len(drawn_readings(part))


def _facts(run: RunHistory) -> Iterator[tuple[str, str]]:
    info = run.info
    taken = max((steps_taken(part) for part in run.optimizers), default=0)
    planned = f" of {info.planned_steps:,}" if info.planned_steps else ""
    yield "Status", f"{info.status}: {info.error}" if info.error else info.status
    yield "Optimizer steps", f"{taken:,}{planned}"
    if info.model:
        size = f", {info.parameters:,} parameters" if info.parameters else ""
        yield "Model", f"{info.model}{size}"
    for optimizer in info.optimizers:
        label = optimizer.get("label")
        yield f"Optimizer {label}" if label else "Optimizer", optimizer_words(optimizer)
    for name, moment in (("Started", info.started), ("Last heard of", info.updated)):
        if moment:
            yield name, _moment(moment)
    if info.versions:
        yield "Versions", ", ".join(f"{name} {v}" for name, v in info.versions.items())


def _moment(moment: str) -> str:
    """A moment in UTC without the part that nobody reads."""
    return f"{moment[:19].replace('T', ' ')} UTC" if moment.endswith(("+00:00", "Z")) else moment
