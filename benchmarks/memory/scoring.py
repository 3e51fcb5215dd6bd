"""From single runs to rows, and to what the probe's horizon says of what is learned."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch

from benchmarks.memory.correlation import interval, ranks, spearman
from benchmarks.memory.models import MODELS
from benchmarks.memory.runner import Job, Result
from benchmarks.memory.tasks import Workload, workload_named

Results = Mapping[Job, Result]
Cell = tuple[str, str]

WHEN = ("before", "after")
# Horizons as multiples of the length, between which runs are counted.
EDGES = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Point:
    """One run as the correlation sees it.

    Attributes:
        cell: Task and model.
        horizons: Horizon divided by the length, before and after training; NaN if not measured.
        progress: From knowing nothing, 0, to the target, 1; in hundredths, so that what is only
            noise beyond the target orders nothing.
        speed: Share of the budget that was left when the target was reached.
        solved: Whether it was reached.
    """

    cell: Cell
    horizons: Mapping[str, float]
    progress: float
    speed: float
    solved: bool


def score(results: Results) -> dict[str, Any]:
    """All tables."""
    cells = _cells(results)
    best = {cell: _best_rate(workload_named(cell[0]), by_rate) for cell, by_rate in cells.items()}
    rows = [_row(cell, best[cell], by_rate) for cell, by_rate in cells.items()]
    chosen = [_point(j, r) for j, r in results.items() if j.lr == best[j.workload, j.model]]
    every = [_point(job, result) for job, result in results.items()]
    return {
        "rows": rows,
        "correlations": [
            *(_correlation(chosen, "best rates", outcome, when) for outcome, when in _pairs()),
            *(_correlation(every, "all rates", "progress", when) for when in WHEN),
        ],
        "by_task": _by_task(chosen),
        "by_horizon": _by_horizon(chosen),
    }


def _pairs() -> list[tuple[str, str]]:
    return [(outcome, when) for outcome in ("progress", "speed") for when in WHEN]


def _cells(results: Results) -> dict[Cell, dict[float, list[Result]]]:
    """By task and model, then by rate, in the order of the models; seeds in order."""
    cells: dict[Cell, dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    order = [model.name for model in MODELS]
    for job in sorted(results, key=lambda job: (order.index(job.model), job.lr, job.seed)):
        cells[job.workload, job.model][job.lr].append(results[job])
    tasks = dict.fromkeys(job.workload for job in results)
    return {cell: cells[cell] for task in tasks for cell in cells if cell[0] == task}


def _best_rate(workload: Workload, by_rate: Mapping[float, Sequence[Result]]) -> float:
    """The rate of most runs solved, then of the fewest steps, then of the best validation."""

    def merit(lr: float) -> tuple[float, ...]:
        runs = by_rate[lr]
        return (
            len(runs),  # of an interrupted benchmark some rates have fewer seeds than others
            sum(_solves(workload, run) for run in runs),
            -sum(run.solved_at if _solves(workload, run) else run.budget for run in runs),
            sum(workload.way(run.validation) for run in runs),
        )

    return max(by_rate, key=merit)


def _row(cell: Cell, lr: float, by_rate: Mapping[float, Sequence[Result]]) -> dict[str, Any]:
    runs = by_rate[lr]
    workload = workload_named(cell[0])
    updates = [run.updates for run in runs if run.updates is not None]
    solved_at = [run.solved_at if _solves(workload, run) else 0 for run in runs]
    return {
        "task": cell[0],
        "model": cell[1],
        "parameters": runs[0].parameters,
        "rates": sorted(by_rate),
        "lr": lr,
        "values": [run.value for run in runs],
        "value": _median_score(workload, [run.value for run in runs]),
        "progress": mean(workload.progress(run.value) for run in runs),
        "solved": sum(step > 0 for step in solved_at),
        "seeds": len(runs),
        "solved_at": solved_at,
        "budget": runs[0].budget,
        "seconds": mean(run.seconds for run in runs),
        "seconds_at_all_rates": sum(run.seconds for runs in by_rate.values() for run in runs),
        **{when: _span([getattr(run, when) for run in runs]) for when in WHEN},
        "updates": median(updates) if updates else None,
        "most_updates": max(updates) if updates else None,
    }


def _solves(workload: Workload, run: Result) -> bool:
    """At its end: a model that skips goes on, and may lose what it had reached."""
    return workload.solved(run.validation)


def _median_score(workload: Workload, values: Sequence[float]) -> float:
    """Over all runs; one that is not finite is the worst."""
    ordered = sorted(values, key=workload.way)
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return mean(middle)


def _span(spans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over seeds of what was measured, and every rate and horizon."""
    rates, horizons = ([span[key] for span in spans] for key in ("rate", "horizon"))
    return {
        "rate": _median(rates),
        "half_life": _median(span["half_life"] for span in spans),
        "horizon": _median(horizons),
        "rates": rates,
        "errors": [span["error"] for span in spans],
        "horizons": horizons,
        "parts": sorted({span["part"] for span in spans}),
        "notes": sorted({span["note"] for span in spans if span["note"]}),
    }


def _point(job: Job, result: Result) -> Point:
    workload = workload_named(job.workload)
    length = workload.timesteps
    spans = {"before": result.before, "after": result.after}
    solved = _solves(workload, result)
    return Point(
        (job.workload, job.model),
        {when: span["horizon"] / length for when, span in spans.items()},
        round(workload.progress(result.value), 2),
        1.0 - result.solved_at / result.budget if solved else 0.0,
        solved,
    )


def _correlation(points: Sequence[Point], runs: str, outcome: str, when: str) -> dict[str, Any]:
    """Between horizon over length and an outcome, over all tasks and within them."""
    known = [point for point in points if not math.isnan(point.horizons[when])]
    # Of ranks, so that the logarithm of the horizon would change nothing.
    horizons = [point.horizons[when] for point in known]
    outcomes = [float(getattr(point, outcome)) for point in known]
    cells = [point.cell for point in known]
    within, ranked = _within(known, horizons), _within(known, outcomes)
    return {
        "runs": runs,
        "outcome": outcome,
        "when": when,
        "count": len(known),
        "unmeasured": len(points) - len(known),
        "groups": len(set(cells)),
        "rho": _spearman(horizons, outcomes),
        "interval": list(interval(horizons, outcomes, cells)),
        "rho_within": _spearman(within, ranked),
        "interval_within": list(interval(within, ranked, cells)),
    }


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    return spearman(first, second) if first else math.nan


def _within(points: Sequence[Point], values: Sequence[float]) -> list[float]:
    """The rank of each value among those of its task, from -1/2 to 1/2."""
    placed = [0.0] * len(values)
    for task in {point.cell[0] for point in points}:
        members = [n for n, point in enumerate(points) if point.cell[0] == task]
        own = ranks(torch.tensor([values[n] for n in members], dtype=torch.float64))
        for n, rank in zip(members, own.tolist(), strict=True):
            placed[n] = (rank - 0.5) / len(members) - 0.5
    return placed


def _by_task(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Correlations with the progress, task by task."""
    found = []
    for task in dict.fromkeys(point.cell[0] for point in points):
        entry: dict[str, Any] = {"task": task}
        for when in WHEN:
            own = [p for p in points if p.cell[0] == task and not math.isnan(p.horizons[when])]
            entry[when] = _spearman([p.horizons[when] for p in own], [p.progress for p in own])
        found.append(entry)
    return found


def _by_horizon(points: Sequence[Point]) -> list[dict[str, Any]]:
    """How many runs reach the target, by horizon over length."""
    bounds = (0.0, *EDGES, math.inf)
    found = []
    for low, high in pairwise(bounds):
        entry: dict[str, Any] = {"from": low, "to": high}
        for when in WHEN:
            # An infinite horizon is one of the last group.
            own = [p for p in points if low <= min(p.horizons[when], sys.float_info.max) < high]
            entry[when] = {"runs": len(own), "solved": sum(p.solved for p in own)}
        found.append(entry)
    return found


def _median(values: Iterable[float]) -> float:
    """Of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan
