"""The result as tables on the screen and as a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory.runner import Job, Result
from benchmarks.memory.scoring import WHEN
from benchmarks.memory.tasks import workload_named
from benchmarks.overhead.results import print_table
from benchmarks.tables import counted, json_text, shown

Table = list[list[str]]

_OUTCOMES = {
    "progress": "progress towards the target",
    "speed": "share of the budget left when it is reached",
}
_STRONG, _MODERATE = 0.7, 0.4


def compact(results: Mapping[Job, Result]) -> list[dict[str, Any]]:
    """The numbers of every single run."""
    return [
        {
            "task": job.workload,
            "model": job.model,
            "lr": job.lr,
            "seed": job.seed,
            "value": result.value,
            "solved_at": result.solved_at,
            "steps": result.steps,
            "before": result.before["rate"],
            "after": result.after["rate"],
            "seconds": result.seconds,
        }
        for job, result in sorted(results.items(), key=lambda pair: pair[0].key)
    ]


def write_json(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``result``; the name tells device and extent."""
    settings = result["settings"]
    part = "_part" if settings["tasks"] or settings["models"] else ""
    extent = "_quick" if settings["quick"] else part
    path = folder / f"memory_{settings['device']}{extent}.json"
    folder.mkdir(parents=True, exist_ok=True)
    text = json_text(result, lambda value: float(f"{value:.4g}"))
    path.write_text(text, encoding="utf-8")
    return path


def task_names(result: Mapping[str, Any]) -> list[str]:
    """In the order in which they were run."""
    return list(dict.fromkeys(row["task"] for row in result["rows"]))


def row_table(result: Mapping[str, Any], task: str) -> Table:
    """Every model on a task, at its best rate."""
    metric = workload_named(task).metric
    rows = [
        [
            "model",
            "parameters",
            "rate",
            metric,
            "solved",
            "at step",
            "half-life before",
            "after",
            "horizon before",
            "after",
            "updates",
        ]
    ]
    rows += [
        [
            row["model"],
            f"{row['parameters']:,}",
            f"{row['lr']:g}",
            value_in_words(metric, row["value"]),
            f"{row['solved']} of {row['seeds']}",
            _steps_in_words(row),
            *(_steps(row[when]["half_life"]) for when in WHEN),
            *(_steps(row[when]["horizon"]) for when in WHEN),
            "" if row["updates"] is None else f"{row['updates']:.0%}",
        ]
        for row in result["rows"]
        if row["task"] == task
    ]
    return rows


def value_in_words(metric: str, value: float | None) -> str:
    """A metric for a table: three digits of an error, percent of an accuracy."""
    if value is None or math.isnan(value):
        return "not finite"
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.3g}"


def _steps_in_words(row: Mapping[str, Any]) -> str:
    """The least and the most steps to the target of those seeds that reach it."""
    made = [step for step in row["solved_at"] if step]
    if not made:
        return "–"
    return str(made[0]) if len(set(made)) == 1 else f"{min(made)}–{max(made)}"


def _steps(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.3g}"


def correlation_table(result: Mapping[str, Any]) -> Table:
    """Each correlation with its interval."""
    rows = [["runs", "horizon", "with", "ρ, all tasks", "ρ within tasks", "number"]]
    rows += [
        [
            entry["runs"],
            entry["when"],
            _OUTCOMES[entry["outcome"]],
            _with_interval(entry["rho"], entry["interval"]),
            _with_interval(entry["rho_within"], entry["interval_within"]),
            str(entry["count"]),
        ]
        for entry in result["correlations"]
    ]
    return rows


def task_table(result: Mapping[str, Any]) -> Table:
    """The correlation with the progress, task by task."""
    rows = [["task", *(f"horizon {when}" for when in WHEN)]]
    rows += [[e["task"], *(shown(e[when]) for when in WHEN)] for e in result["by_task"]]
    return rows


def horizon_table(result: Mapping[str, Any]) -> Table:
    """How many runs reach the target, by horizon over length."""
    rows = [["horizon / length", *(f"{when} training" for when in WHEN)]]
    for entry in result["by_horizon"]:
        high = "" if entry["to"] is None or math.isinf(entry["to"]) else f"{entry['to']:g}"
        name = f"{entry['from']:g} to {high}" if high else f"above {entry['from']:g}"
        rows.append([name, *(_solved_of(entry[when]) for when in WHEN)])
    return rows


def _solved_of(entry: Mapping[str, int]) -> str:
    return f"{entry['solved']} of {entry['runs']} solved" if entry["runs"] else "–"


def _with_interval(rho: float | None, interval: list[float | None]) -> str:
    low, high = interval
    return f"{shown(rho)} [{shown(low)}, {shown(high)}]"


def verdict(result: Mapping[str, Any]) -> str:
    """Whether the probe says beforehand what is learned, in sentences."""
    parts = []
    for entry in result["correlations"]:
        if entry["runs"] == "best rates" and entry["outcome"] == "progress":
            over_all, within = (
                f"{_says(entry['rho' + key], entry['interval' + key])} "
                f"(ρ = {_with_interval(entry['rho' + key], entry['interval' + key])})"
                for key in ("", "_within")
            )
            parts.append(
                f"The horizon {entry['when']} training {over_all} over all tasks, and {within} "
                "within them."
            )
    counts = [entry["before"] for entry in result["by_horizon"]]
    short, long = _pooled(counts[:1]), _pooled(counts[2:])
    parts.append(
        f"Of {counted(short['runs'], 'run')} with a horizon before training below half the length, "
        f"{short['solved']} reached the target; of {counted(long['runs'], 'run')} with one of at "
        f"least the length, {long['solved']}."
    )
    return " ".join(parts)


def _pooled(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(entry[key] for entry in counts) for key in ("runs", "solved")}


def _says(rho: float | None, interval: Sequence[float | None]) -> str:
    """The strength of a correlation in words."""
    low, high = interval
    if rho is None or low is None or high is None or not math.isfinite(rho + low + high):
        return "cannot be compared with what is learned"
    if low <= 0.0 <= high:
        return "says nothing certain of what is learned"
    size = "strongly" if abs(rho) >= _STRONG else "moderately"
    size = size if abs(rho) >= _MODERATE else "weakly"
    return f"goes {size} {'with' if rho > 0 else 'against'} what is learned"


def print_tables(result: Mapping[str, Any]) -> None:
    """All tables."""
    for task in task_names(result):
        _print(f"{task}: medians over seeds at each model's best rate", row_table(result, task))
    _print("Spearman's ρ of horizon / length", correlation_table(result))
    _print("ρ with the progress, task by task", task_table(result))
    _print("Runs that reach the target", horizon_table(result))
    print(f"\n{verdict(result)}\n")
    for entry in result["aims"]:
        print(f"{'met' if entry['met'] else 'NOT met'}: {entry['aim']}")


def _print(title: str, table: Table) -> None:
    print_table(title, table[0], table[1:])
