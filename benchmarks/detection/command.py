"""``python -m benchmarks detection``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.detection.cases import failing_cases
from benchmarks.detection.document import write
from benchmarks.detection.jobs import (
    DEVELOPMENT,
    HELD_OUT,
    Job,
    jobs_of,
    rejudge_job,
    run_job,
    select,
)
from benchmarks.detection.judging import JudgedRun
from benchmarks.detection.results import RESULTS, compact, print_cases, print_tables, write_json
from benchmarks.detection.scoring import score
from benchmarks.detection.sensitivity import sweep
from benchmarks.detection.split import side
from benchmarks.kept import folder_for
from benchmarks.machine import describe_machine
from benchmarks.pictures import if_matplotlib_is_there
from benchmarks.workers import Crash, in_processes

SPLITS = {
    "all": (DEVELOPMENT, HELD_OUT),
    "development": (DEVELOPMENT,),
    "held-out": (HELD_OUT,),
}
# Fast ones, failing and healthy on either side of the split.
QUICK = (
    "adding_60_tanh",
    "recent_3_of_60_tanh",
    "mlp_12_sigmoid",
    "mlp_12_batch_norm",
    "mlp_sgd_lr_x1000",
    "mlp_maximizes",
    "mlp_converged",
    "mlp_nan_in_batch",
    "mlp_bias_-6",
    "mlp_sparse",
    "mlp_20_tanh_small",
    "mlp_20_tanh_xavier",
    "mlp_sigmoid_normal_10",
    "mlp_sigmoid",
    "gru_negated_loss",
    "gru_rows",
)
SEEDS, QUICK_SEEDS = 10, 2
SWEEP_SECONDS, QUICK_SWEEP_SECONDS = 900.0, 60.0
FEW_RUNS = 60
INTERRUPTED = 130  # what a shell reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="two seeds of few programs, within five minutes"
    )
    parser.add_argument("--seeds", type=int, help=f"of each program; default {SEEDS}")
    parser.add_argument("--programs", nargs="+", default=(), metavar="PATTERN")
    parser.add_argument(
        "--split", choices=tuple(SPLITS), help="default: all; with --rescore development"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes of one thread each; 0 runs all in this one"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plots")
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder where runs are kept, and from which they are taken if they are there; holds "
        "pickles, so use none of others; delete it when programs or measurements changed",
    )
    parser.add_argument("--no-sweep", action="store_true", help="do not vary the thresholds")
    parser.add_argument(
        "--rescore",
        action="store_true",
        help="train and write nothing: judge the runs in --cache with the present detectors",
    )


def run(options: argparse.Namespace) -> int:
    """Train, judge, print and write."""
    _check(options)
    torch.set_num_threads(1)
    with folder_for(options.cache) as folder:
        jobs = _jobs(options, folder)
        if not jobs:
            sys.exit("no run: no program matches, or none was kept")
        if options.rescore:
            return _rescore(options, jobs)
        return _measure(options, jobs)


def _measure(options: argparse.Namespace, jobs: list[Job]) -> int:
    started = time.perf_counter()
    machine = describe_machine(options.device)
    runs, crashes, interrupted = collect(run_job, jobs, options.jobs)
    result = assemble(runs, crashes)
    result |= {
        "machine": machine,
        "settings": {
            "device": options.device,
            "quick": options.quick,
            "seeds": _seeds(options),
            "programs": list(options.programs),
            "split": options.split or "all",
            "jobs": options.jobs,
            "seconds": round(time.perf_counter() - started),
        },
    }
    if not options.no_sweep and not interrupted:
        _sweep(options, jobs, runs, result)
    say("")
    print_tables(result)
    path = write_json(result, options.output)
    print(f"\n{path}")
    _plot(result, path)
    if interrupted:
        return INTERRUPTED
    if path.name == "detection_cpu.json" and "sweep" in result and options.output == RESULTS:
        print(write(result))
    return 1 if crashes else 0


def _sweep(
    options: argparse.Namespace, jobs: Sequence[Job], runs: Sequence[JudgedRun], result: Any
) -> None:
    seconds = QUICK_SWEEP_SECONDS if options.quick else SWEEP_SECONDS
    done = {(run.program, run.seed) for run in _on_side(runs, DEVELOPMENT)}
    # Seed by seed, so that however many there is time for, all programs are among them.
    files = [j.path for j in sorted(jobs, key=lambda j: j.seed) if (j.program, j.seed) in done]
    if files:
        programs = len({program for program, _ in done})
        result["sweep"] = sweep(files, programs, options.jobs, seconds, say)


def _rescore(options: argparse.Namespace, jobs: list[Job]) -> int:
    # To start processes takes longer than to judge a few runs here.
    processes = options.jobs if len(jobs) > FEW_RUNS else 0
    runs, crashes, interrupted = collect(rejudge_job, jobs, processes, quietly=True)
    result = assemble(runs, crashes)
    print_tables(result)
    print_cases(result)
    if interrupted:
        return INTERRUPTED
    return 1 if crashes else 0


def collect(
    work: Any, jobs: Sequence[Job], processes: int, *, quietly: bool = False
) -> tuple[list[JudgedRun], list[dict[str, Any]], bool]:
    """Does all jobs; an interrupt or a crash loses only what was not yet done.

    Returns:
        The runs by program and seed, what crashed, and whether it was interrupted.
    """
    runs: list[JudgedRun] = []
    crashes: list[dict[str, Any]] = []
    started, total, done = time.perf_counter(), sum(job.steps for job in jobs), 0
    interrupted = False
    results: Iterator[tuple[Job, Any]] = in_processes(work, jobs, processes)
    try:
        for job, result in results:
            done += job.steps
            if isinstance(result, Crash):
                crashes.append({"program": job.program, "seed": job.seed, "reason": result.reason})
                say(f"{job.program}, seed {job.seed}: crashed")
            else:
                runs.append(result)
            if not quietly:
                left = (time.perf_counter() - started) * (total - done) / done
                number = len(runs) + len(crashes)
                say(
                    f"{number}/{len(jobs)} {job.program}, seed {job.seed}; "
                    f"about {left / 60:.1f} min left"
                )
    except KeyboardInterrupt:
        interrupted = True
        say(f"interrupted: {len(runs)} of {len(jobs)} runs are judged")
    finally:
        getattr(results, "close", lambda: None)()
    return sorted(runs, key=lambda run: (run.program, run.seed)), crashes, interrupted


def assemble(runs: Sequence[JudgedRun], crashes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result of all runs as plain values, each side of the split by itself."""
    sides = {name: _on_side(runs, name) for name in (DEVELOPMENT, HELD_OUT) if _on_side(runs, name)}
    return {
        "benchmark": "detection",
        "sides": {name: score(of_side) for name, of_side in sides.items()},
        "cases": {name: failing_cases(of_side) for name, of_side in sides.items()},
        "crashes": list(crashes),
        "replay_differs": [f"{r.program}, seed {r.seed}" for r in runs if r.differs],
        **compact(runs),
    }


def say(line: str) -> None:
    """Show how far it is: on one line that the next overwrites, or on lines of their own."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


def _on_side(runs: Sequence[JudgedRun], name: str) -> list[JudgedRun]:
    programs = {program.name: side(program) for program in select((), (DEVELOPMENT, HELD_OUT))}
    return [run for run in runs if programs[run.program] == name]


def _jobs(options: argparse.Namespace, folder: Path) -> list[Job]:
    split = options.split or ("development" if options.rescore else "all")
    patterns = options.programs or (QUICK if options.quick else ())
    jobs = jobs_of(select(patterns, SPLITS[split]), _seeds(options), folder)
    return [job for job in jobs if job.path.exists()] if options.rescore else jobs


def _seeds(options: argparse.Namespace) -> int:
    return int(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))


def _check(options: argparse.Namespace) -> None:
    if options.seeds is not None and options.seeds < 1:
        sys.exit(f"--seeds must be at least 1, got {options.seeds}")
    if options.jobs < 0:
        sys.exit(f"--jobs must be at least 0, got {options.jobs}")
    if options.rescore and options.cache is None:
        sys.exit("--rescore needs the --cache of an earlier run")


def _plot(result: dict[str, Any], path: Path) -> None:
    if not result["sides"]:
        return
    with if_matplotlib_is_there():
        from benchmarks.detection.plot import plot_confusion, plot_scores

        print(plot_scores(result, path.with_suffix(".png")))
        name = path.stem.replace("detection_", "detection_confusion_", 1)
        print(plot_confusion(result, path.with_name(f"{name}.png")))
