"""From results of single runs to tables: ranges, rescues, faults, harm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from benchmarks.rescue.contenders import BARE, GUARD
from benchmarks.rescue.faults import FAULTS
from benchmarks.rescue.runner import Job, Result
from benchmarks.rescue.workloads import OPTIMIZERS, WORKLOADS

# Of the way from the floor to the best mean score that anything but the guard has at any rate.
TARGET_SHARE = 0.8
# Less than this above the floor, and nothing but the guard has learned anything.
LEAST_LEARNED = 0.15
# Decades between two learning rates of a grid.
SPACING = 0.5
# A pair is worse if it differs by this many standard deviations of a difference of two seeds.
NOISE = 2.0

Results = Mapping[Job, Result]


def score(results: Results) -> dict[str, Any]:
    """All tables as plain values."""
    targets = _targets(results)
    return {
        "workloads": [_workload(results, key, targets) for key in _keys(results)],
        "rescue": _rescue(results, targets),
        "faults": _faults(results, targets),
        "harm": _harm(results, targets),
    }


def _keys(results: Results) -> list[tuple[str, str]]:
    present = {(job.workload, job.optimizer) for job in results if not job.fault}
    every = ((workload.name, optimizer) for workload in WORKLOADS for optimizer in OPTIMIZERS)
    return [key for key in every if key in present]


def _floor(workload: str) -> float:
    return next(w.task().floor for w in WORKLOADS if w.name == workload)


def _rates(workload: str, optimizer: str) -> list[float]:
    return next(w.rates(optimizer) for w in WORKLOADS if w.name == workload)


def _targets(results: Results) -> dict[tuple[str, str], float]:
    """What a run has to reach; workloads that nothing else learns have no target."""
    cells: dict[tuple[str, str, float, str], list[float]] = defaultdict(list)
    for job, result in results.items():
        on_grid = job.lr in _rates(job.workload, job.optimizer)
        if not job.fault and on_grid and job.contender != GUARD:
            cells[job.workload, job.optimizer, job.lr, job.contender].append(result.score)
    best: dict[tuple[str, str], float] = {}
    for (workload, optimizer, _, _), scores in cells.items():
        key = workload, optimizer
        best[key] = max(best.get(key, -math.inf), mean(scores))
    return {
        (workload, optimizer): _floor(workload) + TARGET_SHARE * (top - _floor(workload))
        for (workload, optimizer), top in best.items()
        if top - _floor(workload) >= LEAST_LEARNED
    }


def _workload(
    results: Results, key: tuple[str, str], targets: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    """Mean scores and ranges of every contender."""
    workload, optimizer = key
    rates = _rates(workload, optimizer)
    scores: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for job, result in results.items():
        if (job.workload, job.optimizer) == key and not job.fault and job.lr in rates:
            scores[job.contender][job.lr][job.seed] = result.score
    target = targets.get(key)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "scores": [_mean(cells[lr].values()) for lr in rates],
            "ranges": _ranges(cells, target) if target is not None else [],
        }
        for name, cells in scores.items()
    }
    for row in rows.values():
        row["range"] = _mean(row["ranges"])
    return {
        "workload": workload,
        "optimizer": optimizer,
        "rates": rates,
        "target": target,
        "contenders": rows,
        **_against_best_peer(rows),
    }


def _ranges(cells: Mapping[float, Mapping[int, float]], target: float) -> list[float]:
    """Decades of learning rate over which each seed reaches the target."""
    reached: dict[int, int] = defaultdict(int)
    for by_seed in cells.values():
        for seed, value in by_seed.items():
            reached[seed] += value >= target
    return [SPACING * count for _, count in sorted(reached.items())]


def _against_best_peer(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    peers = {name: row["range"] for name, row in rows.items() if name != GUARD and row["ranges"]}
    if not peers or GUARD not in rows:
        return {"best_peer": None, "ahead": None}
    best = max(peers, key=lambda name: peers[name])
    return {"best_peer": best, "ahead": rows[GUARD]["range"] - peers[best]}


def _rescue(results: Results, targets: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Of the runs on the grids that miss the target unguarded, the share that reaches it."""
    bare = _bare_runs(results, targets)
    failing = {key for key, value in bare.items() if value < targets[key[0], key[1]]}
    reached: dict[str, list[bool]] = defaultdict(list)
    for job, result in results.items():
        key = (job.workload, job.optimizer, job.lr, job.seed)
        if not job.fault and key in failing:
            reached[job.contender].append(result.score >= targets[key[0], key[1]])
    return {
        "failing": len(failing),
        "rates": {name: _mean(values) for name, values in reached.items()},
    }


def _bare_runs(
    results: Results, targets: Mapping[tuple[str, str], float]
) -> dict[tuple[str, str, float, int], float]:
    return {
        (job.workload, job.optimizer, job.lr, job.seed): result.score
        for job, result in results.items()
        if job.contender == BARE
        and not job.fault
        and (job.workload, job.optimizer) in targets
        and job.lr in _rates(job.workload, job.optimizer)
    }


def _faults(results: Results, targets: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Share of runs that reach the target in spite of a fault, and what they cost.

    Only runs whose twin without fault and guard reaches it count.
    """
    twins = {
        (job.workload, job.optimizer, job.lr, job.seed): result
        for job, result in results.items()
        if job.contender == BARE and not job.fault
    }
    saved: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    times: list[float] = []
    lost: list[str] = []
    for job, result in results.items():
        twin = twins.get((job.workload, job.optimizer, job.lr, job.seed))
        target = targets.get((job.workload, job.optimizer))
        if not job.fault or twin is None or target is None or twin.score < target:
            continue
        saved[job.contender][job.fault].append(result.score >= target)
        if job.contender == GUARD:
            times.append(result.seconds / twin.seconds)
            if result.score < target:
                lost.append(f"{job.workload}, {job.optimizer}, {job.fault}, seed {job.seed}")
    return {
        "runs": {name: sum(map(len, by.values())) for name, by in saved.items()},
        "rates": {
            name: {
                **{fault: _mean(by[fault]) for fault in FAULTS if by[fault]},
                "all": _mean([value for values in by.values() for value in values]),
            }
            for name, by in saved.items()
        },
        "time_ratio": median(times) if times else None,
        "lost": sorted(lost),
    }


def _harm(results: Results, targets: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Runs that are healthy unguarded, beside the same runs with the guard."""
    bare = _bare_runs(results, targets)
    healthy = {key: value for key, value in bare.items() if value >= targets[key[0], key[1]]}
    noise = _seed_noise(healthy)
    pairs = []
    for job, result in results.items():
        key = (job.workload, job.optimizer, job.lr, job.seed)
        if job.contender == GUARD and not job.fault and key in healthy:
            bound = NOISE * math.sqrt(2.0) * noise[key[0], key[1]]
            pairs.append((key, result.score - healthy[key], bound))
    differences = [difference for _, difference, _ in pairs]
    by_cell: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for key, difference, _ in pairs:
        by_cell[key[0], key[1], key[2]].append(difference)
    return {
        "pairs": len(pairs),
        "identical": sum(difference == 0.0 for difference in differences),
        "mean": _mean(differences),
        "interval": _interval([mean(values) for values in by_cell.values()]),
        "better": sum(difference > bound for _, difference, bound in pairs),
        "worse": sorted(
            f"{workload}, {optimizer}, {lr:g}, seed {seed}: {difference:+.3f} (noise {bound:.3f})"
            for (workload, optimizer, lr, seed), difference, bound in pairs
            if difference < -bound
        ),
    }


def _seed_noise(
    healthy: Mapping[tuple[str, str, float, int], float],
) -> dict[tuple[str, str], float]:
    """Standard deviation over seeds at one rate, pooled over the rates of a workload."""
    cells: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for (workload, optimizer, lr, _), value in healthy.items():
        cells[workload, optimizer, lr].append(value)
    spread: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for (workload, optimizer, _), values in cells.items():
        if len(values) > 1:
            spread[workload, optimizer].append((len(values) - 1, stdev(values) ** 2))
    noise = dict.fromkeys(((key[0], key[1]) for key in healthy), 0.0)
    for key, parts in spread.items():
        freedom = sum(count for count, _ in parts)
        noise[key] = math.sqrt(sum(count * variance for count, variance in parts) / freedom)
    return noise


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return mean(known) if known else math.nan


def _interval(values: Sequence[float]) -> list[float]:
    """95% interval of the mean, of values that are taken to be independent."""
    if len(values) < 2:
        return [math.nan, math.nan]
    half = 1.96 * stdev(values) / math.sqrt(len(values))
    return [mean(values) - half, mean(values) + half]
