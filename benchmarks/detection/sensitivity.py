"""What becomes of the scores if one number of the thresholds is halved or doubled.

The observations of the development programs are replayed; nothing is trained again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.detection.jobs import read_fresh
from benchmarks.detection.judging import AMBIGUOUS, OURS, judge
from benchmarks.detection.records import RunResult
from benchmarks.detection.scoring import counted, decide, measure
from benchmarks.detection.statistics import Bootstrap
from benchmarks.workers import Crash, in_processes
from lightning_gradguard.diagnose import Thresholds

FACTORS = (0.5, 2.0)
WATCHED = ("f1", "precision", "recall", "macro_f1")
# Half-way back to the default, so many times, where the factor leads to a value that is refused.
_ATTEMPTS = 6


@dataclass(frozen=True)
class Variation:
    """Thresholds of which one differs.

    Attributes:
        name: The number that differs; empty for the defaults.
        factor: What it was to be multiplied by.
        value: What it is; the nearest value that is allowed.
        thresholds: All numbers.
    """

    name: str
    factor: float
    value: float
    thresholds: Thresholds


@dataclass(frozen=True)
class _Task:
    variation: Variation
    files: tuple[Path, ...]


def variations(defaults: Thresholds) -> Iterator[Variation]:
    """Yields every number times every factor, or as far in that direction as is allowed."""
    for field in fields(defaults):
        default = getattr(defaults, field.name)
        if isinstance(default, bool) or not isinstance(default, int | float):
            continue
        for factor in FACTORS:
            variation = _vary(defaults, field.name, default, factor)
            if variation is not None:
                yield variation


def _vary(defaults: Thresholds, name: str, default: float, factor: float) -> Variation | None:
    wanted = default * factor
    for _ in range(_ATTEMPTS):
        value: Any = round(wanted) if isinstance(default, int) else wanted
        if value == default:
            return None
        try:
            return Variation(name, factor, value, replace(defaults, **{name: value}))
        except ValueError:
            wanted = (wanted + default) / 2
    return None


def sweep(
    files: Sequence[Path],
    least: int,
    processes: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the scores with the defaults, and how they change with every variation.

    Args:
        files: Kept runs of development programs, in the order in which they are to be used: as
            many as there is time for.
        least: How many of them to use in any case: one of each program.
        processes: How many processes to use.
        seconds: After which no more results are waited for.
        say: Tells how far it is.
    """
    start = time.perf_counter()
    all_variations = list(variations(Thresholds()))
    used = affordable(files, least, (len(all_variations) + 1) / max(processes, 1), seconds)
    defaults = Variation("", 1.0, 1.0, Thresholds())
    tasks = [_Task(variation, tuple(used)) for variation in (defaults, *all_variations)]
    scores: dict[tuple[str, float], dict[str, float | None]] = {}
    crashes = []
    for task, result in in_processes(_measure, tasks, processes):
        variation = task.variation
        if isinstance(result, Crash):
            crashes.append(f"{variation.name} x {variation.factor}: {result.reason}")
        else:
            scores[variation.name, variation.factor] = result
        if len(scores) % 10 == 0:
            say(f"thresholds varied: {len(scores) - 1} of {len(all_variations)}")
        if time.perf_counter() - start > seconds and ("", 1.0) in scores:
            break
    base = scores.get(("", 1.0), {})
    rows = [
        {
            "name": v.name,
            "factor": v.factor,
            "value": v.value,
            **_change(scores[v.name, v.factor], base),
        }
        for v in all_variations
        if (v.name, v.factor) in scores
    ]
    return {
        "runs": len(used),
        "defaults": base,
        "changes": rows,
        "left_out": len(all_variations) - len(rows),
        "crashes": crashes,
    }


def affordable(files: Sequence[Path], least: int, rounds: float, seconds: float) -> Sequence[Path]:
    """Returns as many of the files as can be replayed so many times, judged by the first few."""
    sample = files[: max(len(files) // 10, 1)]
    start = time.perf_counter()
    for file in sample:
        judge(read_fresh(file))
    each = (time.perf_counter() - start) / max(len(sample), 1)
    # Half of the time is left for what is slower than it looked.
    return files[: max(int(0.5 * seconds / max(rounds * each, 1e-9)), least)]


@lru_cache(maxsize=1)
def _load(files: tuple[Path, ...]) -> list[RunResult]:
    runs = (read_fresh(file) for file in files)
    return [replace(run, alarms={}) for run in runs if run.label != AMBIGUOUS]


def _measure(task: _Task) -> dict[str, float | None]:
    runs = counted([judge(run, task.variation.thresholds) for run in _load(task.files)])
    verdicts = [decide(run, run.claims[OURS]) for run in runs]
    metrics = measure(runs, verdicts, Bootstrap(runs, resamples=0))
    return {name: metrics[name]["value"] for name in WATCHED}


def _change(
    scores: dict[str, float | None], base: dict[str, float | None]
) -> dict[str, float | None]:
    changes: dict[str, float | None] = {}
    for name in WATCHED:
        now, before = scores[name], base.get(name)
        changes[name] = None if now is None or before is None else now - before
    return changes
