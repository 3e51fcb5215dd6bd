"""``python -m benchmarks rescue``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import finish, folder_for
from benchmarks.machine import describe_machine
from benchmarks.options import add_run_options, check_run_options, seeds_of
from benchmarks.overhead.results import RESULTS
from benchmarks.pictures import if_matplotlib_is_there
from benchmarks.rescue.contenders import CONTENDERS, select
from benchmarks.rescue.document import write
from benchmarks.rescue.jobs import Kept, fault_jobs, grid_jobs
from benchmarks.rescue.results import compact, print_tables, write_json
from benchmarks.rescue.runner import Job, run_job
from benchmarks.rescue.scoring import score
from benchmarks.rescue.workloads import WORKLOADS

SEEDS = 5
# The cheapest nets of either kind, a seed, and every second learning rate.
QUICK_WORKLOADS = ("digits_lstm", "mlp_12", "transformer")
QUICK_STRIDE = 2
QUICK_STEPS = 150
INTERRUPTED = 130  # what a shell reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    names = tuple(workload.name for workload in WORKLOADS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="few nets, one seed, half the rates: a few minutes"
    )
    parser.add_argument("--seeds", type=int, help=f"default {SEEDS}")
    parser.add_argument("--workloads", nargs="+", choices=names, default=(), metavar="NAME")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=tuple(contender.name for contender in CONTENDERS),
        default=(),
        metavar="NAME",
    )
    add_run_options(parser, RESULTS, "contender")


def run(options: argparse.Namespace) -> int:
    """Train, print and write."""
    check_run_options(options)
    torch.set_num_threads(1)
    started = time.perf_counter()
    with folder_for(options.cache) as folder:
        kept, jobs = Kept(folder), _jobs(options)
        crashes, interrupted = finish(kept, jobs, run_job, options.jobs)
        results = {job: kept.results[job] for job in jobs if job in kept.results}
    if not results:
        sys.exit("no run was finished")
    result = {
        "benchmark": "rescue",
        "machine": describe_machine(options.device),
        "settings": {
            "device": options.device,
            "quick": options.quick,
            "seeds": seeds_of(options, SEEDS),
            "workloads": list(options.workloads),
            "contenders": list(options.contenders),
            "jobs": options.jobs,
            "seconds": round(time.perf_counter() - started),
        },
        "crashes": crashes,
        **score(results),
        "runs": compact(results),
    }
    print_tables(result)
    path = write_json(result, options.output)
    print(f"\n{path}")
    _plot(result, path)
    if interrupted:
        return INTERRUPTED
    if path.name == "rescue_cpu.json" and options.output == RESULTS:
        # From the file, so that the page can be compared with it.
        print(write(json.loads(path.read_text(encoding="utf-8"))))
    return 1 if crashes else 0


def _jobs(options: argparse.Namespace) -> list[Job]:
    names = options.workloads or (QUICK_WORKLOADS if options.quick else ())
    workloads = [w for w in WORKLOADS if w.name in names or not names]
    contenders, seeds = select(options.contenders), seeds_of(options, SEEDS)
    common: dict[str, Any] = {
        "device": options.device,
        "steps": QUICK_STEPS if options.quick else 0,
    }
    stride = QUICK_STRIDE if options.quick else 1
    jobs = [
        *grid_jobs(workloads, contenders, seeds, stride=stride, **common),
        *fault_jobs(workloads, contenders, seeds, **common),
    ]
    return sorted(jobs, key=lambda job: job.seed)


def _plot(result: dict[str, Any], path: Path) -> None:
    with if_matplotlib_is_there():
        from benchmarks.rescue.plot import plot_scores

        print(plot_scores(result, path.with_suffix(".png")))
