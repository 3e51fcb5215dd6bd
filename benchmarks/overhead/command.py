"""``python -m benchmarks overhead``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.options import check_device
from benchmarks.overhead.contenders import BARE, CONTENDERS, Contender, finish_wandb
from benchmarks.overhead.counting import added_counts, count_steps
from benchmarks.overhead.memory import peak_memory
from benchmarks.overhead.results import RESULTS, print_tables, write_json
from benchmarks.overhead.timing import Schedule, compare
from benchmarks.overhead.turns import share_one_heap
from benchmarks.overhead.workloads import (
    LEARNING_RATE,
    OPTIMIZERS,
    WORKLOADS,
    Workload,
    counting_workload,
)
from benchmarks.pictures import if_matplotlib_is_there

QUICK = Schedule(warm_steps=30, rounds=6, steps=3)
FULL = Schedule(warm_steps=35, rounds=12, steps=5)
# A step takes a second on one CPU core: as many as there is time for.
HEAVY_ON_CPU = Schedule(warm_steps=30, rounds=8, steps=2)
MEMORY_STEPS = 4
COUNTED_TENSORS = (100, 300)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="for time and memory"
    )
    parser.add_argument("--quick", action="store_true", help="cheap contenders, no heavy workload")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), help="default: all")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all")
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(_PARTS), default=list(_PARTS), help="default: all"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write."""
    check_device(options)
    one_heap = share_one_heap()
    torch.set_num_threads(1)
    os.environ.setdefault("WANDB_SILENT", "true")
    result: dict[str, Any] = {
        "benchmark": "overhead",
        "machine": describe_machine(options.device),
        "settings": {
            "device": options.device,
            "optimizer": options.optimizer,
            "learning_rate": LEARNING_RATE,
            "quick": options.quick,
            # Other processes may share the cores: processor time does not see them.
            "clock": "wall" if options.device == "cuda" else "cpu",
            "one_heap_for_all_threads": one_heap,
            "schedules": {name: vars(_schedule(w, options)) for name, w in WORKLOADS.items()},
        },
        "workloads": {w.name: w.describe() for w in _workloads(options)},
        "not_installed": [c.name for c in _wanted(options) if not c.installed],
    }
    started = time.perf_counter()
    with quiet(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        for part in options.parts:
            result[part] = _PARTS[part](options, Path(directory))
        finish_wandb()
    result["settings"]["seconds"] = round(time.perf_counter() - started)
    say("")
    print_tables(result)
    path = write_json(result, options.output)
    print(f"\n{path}")
    with if_matplotlib_is_there():
        from benchmarks.overhead.plot import plot

        if "time" in result:
            print(plot(result, path.with_suffix(".png")))
    return 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out the advice that Lightning has for real runs, once for each of many Trainers."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _measure_time(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for workload in _workloads(options):
        schedule = _schedule(workload, options)
        ratios = compare(
            workload,
            _contenders(workload, options),
            schedule,
            optimizer=options.optimizer,
            device=options.device,
            directory=directory / "time" / workload.name,
            say=say,
        )
        finish_wandb()
        measured[workload.name] = {
            name: {clock: pairs.summary(clock, schedule.steps) for clock in ("cpu", "wall")}
            for name, pairs in ratios.items()
        }
    return measured


def _measure_memory(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for workload in _workloads(options):
        measured[workload.name] = {}
        for contender in _contenders(workload, options):
            say(f"{workload.name}: memory of {contender.name}")
            measured[workload.name][contender.name] = peak_memory(
                workload,
                contender,
                optimizer=options.optimizer,
                device=options.device,
                directory=directory / "memory" / workload.name / contender.name,
                steps=MEMORY_STEPS,
            )
            finish_wandb()
    return measured


def _count(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        for tensors in COUNTED_TENSORS:
            workload = counting_workload(tensors)
            counts = {}
            for contender in _contenders(workload, options):
                say(f"counting {contender.name}, {tensors} tensors, {optimizer}")
                counts[contender.name] = count_steps(
                    workload,
                    contender,
                    optimizer=optimizer,
                    device=options.device,
                    directory=directory / "counts" / contender.name,
                )
                finish_wandb()
            bare = counts.pop(BARE)
            measured.setdefault(optimizer, {})[str(tensors)] = {
                name: added_counts(steps, bare) for name, steps in counts.items()
            }
    return measured


_PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "counts": _count,
    "time": _measure_time,
    "memory": _measure_memory,
}


def _workloads(options: argparse.Namespace) -> list[Workload]:
    chosen = [WORKLOADS[name] for name in options.workloads or WORKLOADS]
    skip_heavy = options.quick and not options.workloads
    return [w for w in chosen if not (w.heavy and skip_heavy)]


def _wanted(options: argparse.Namespace) -> list[Contender]:
    names = options.contenders or CONTENDERS
    return [c for name, c in CONTENDERS.items() if name in names or name == BARE]


def _contenders(workload: Workload, options: argparse.Namespace) -> list[Contender]:
    only_cheap = options.quick or (workload.heavy and options.device == "cpu")
    only_cheap = only_cheap and not options.contenders
    return [c for c in _wanted(options) if c.installed and (c.cheap or not only_cheap)]


def _schedule(workload: Workload, options: argparse.Namespace) -> Schedule:
    if options.quick:
        return QUICK
    return HEAVY_ON_CPU if workload.heavy and options.device == "cpu" else FULL


def say(line: str) -> None:
    """Show what is under way, on one line that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
