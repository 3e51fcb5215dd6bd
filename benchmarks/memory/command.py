"""``python -m benchmarks memory``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import Kept, finish, folder_for
from benchmarks.machine import describe_machine
from benchmarks.memory.aims import aims
from benchmarks.memory.document import write
from benchmarks.memory.models import MODELS, select
from benchmarks.memory.results import compact, print_tables, write_json
from benchmarks.memory.runner import Job, Result, run_job, seconds_per_step
from benchmarks.memory.scoring import score
from benchmarks.memory.tasks import QUICK, WORKLOADS, Workload, workload_named
from benchmarks.options import add_run_options, check_run_options, seeds_of
from benchmarks.overhead.results import RESULTS
from benchmarks.pictures import if_matplotlib_is_there

SEEDS = 3
INTERRUPTED = 130  # what a shell reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="short tasks, one seed, one rate: a few minutes"
    )
    parser.add_argument("--seeds", type=int, help=f"default {SEEDS}")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=tuple(model.name for model in MODELS),
        default=(),
        metavar="NAME",
        help="default: on each task those that it is for",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=tuple(workload.name for workload in (*WORKLOADS, *QUICK)),
        default=(),
        metavar="NAME",
    )
    add_run_options(parser, RESULTS, "model")


def run(options: argparse.Namespace) -> int:
    """Train, print and write."""
    check_run_options(options)
    torch.set_num_threads(1)
    started, jobs = time.perf_counter(), _jobs(options)
    with folder_for(options.cache) as folder:
        kept = Kept(folder, Job, Result, lambda job: job.model)
        missing = kept.missing(jobs)
        if missing:
            minutes = estimate(missing) / max(options.jobs, 1) / 60
            print(f"{len(missing)} runs, at most about {minutes:.0f} min", file=sys.stderr)
        crashes, interrupted = finish(kept, jobs, run_job, options.jobs, report_every=10)
        results = {job: kept.results[job] for job in jobs if job in kept.results}
    if not results:
        sys.exit("no run was finished")
    tables = score(results)
    result = {
        "benchmark": "memory",
        "machine": describe_machine(options.device),
        "settings": {
            "device": options.device,
            "quick": options.quick,
            "seeds": seeds_of(options, SEEDS),
            "tasks": list(options.tasks),
            "models": list(options.models),
            "jobs": options.jobs,
            "seconds": round(time.perf_counter() - started),
            "seconds_of_runs": round(sum(run.seconds for run in results.values())),
        },
        "crashes": crashes,
        "aims": aims(tables["rows"]),
        **tables,
        "runs": compact(results),
    }
    print_tables(result)
    path = write_json(result, options.output)
    print(f"\n{path}")
    _plot(result, path)
    if interrupted:
        return INTERRUPTED
    if path.name == "memory_cpu.json" and options.output == RESULTS:
        # From the file, so that the page can be compared with it.
        print(write(json.loads(path.read_text(encoding="utf-8"))))
    return 1 if crashes else 0


def estimate(jobs: Sequence[Job]) -> float:
    """Seconds of one process for the whole budgets, from a few steps of every model and task."""
    per_step: dict[tuple[str, str], float] = {}
    total = 0.0
    for job in jobs:
        workload, pair = workload_named(job.workload), (job.workload, job.model)
        if pair not in per_step:
            (model,) = select([job.model])
            per_step[pair] = seconds_per_step(workload, model, job.device)
        total += per_step[pair] * (job.steps or workload.steps)
    return total


def _jobs(options: argparse.Namespace) -> list[Job]:
    workloads = [workload_named(name) for name in options.tasks] or list(
        QUICK if options.quick else WORKLOADS
    )
    jobs = [
        Job(workload.name, model.name, lr, seed, _steps(workload, options), options.device)
        for seed in range(seeds_of(options, SEEDS))
        for workload in workloads
        for model in select(options.models or workload.models)
        for lr in (model.rates[len(model.rates) // 2 :][:1] if options.quick else model.rates)
    ]
    return sorted(jobs, key=lambda job: job.seed)


def _steps(workload: Workload, options: argparse.Namespace) -> int:
    return min(workload.steps, QUICK[0].steps) if options.quick else 0


def _plot(result: dict[str, Any], path: Path) -> None:
    with if_matplotlib_is_there():
        from benchmarks.memory.plot import plot_memory

        print(plot_memory(result, path.with_suffix(".png")))
