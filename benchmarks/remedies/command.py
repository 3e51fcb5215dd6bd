"""``python -m benchmarks remedies``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.options import check_device
from benchmarks.pictures import if_matplotlib_is_there
from benchmarks.remedies.cases import CASES, Case
from benchmarks.remedies.document import DOCUMENT, document
from benchmarks.remedies.programs import train
from benchmarks.remedies.results import RESULTS, print_tables, write_json

SEEDS, QUICK_SEEDS = 5, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one seed, and no new document")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=[case.anchor for case in CASES],
        metavar="CASE",
        help="headings of docs/remedies.md, lower case with hyphens; default: all",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write."""
    check_device(options)
    torch.set_num_threads(1)
    seeds = range(QUICK_SEEDS if options.quick else SEEDS)
    cases = [case for case in CASES if not options.cases or case.anchor in options.cases]
    started = time.perf_counter()
    result: dict[str, Any] = {
        "benchmark": "remedies",
        "machine": describe_machine(options.device),
        "settings": {"device": options.device, "quick": options.quick, "seeds": len(seeds)},
        "cases": measure(cases, seeds, options.device),
    }
    result["settings"]["seconds"] = round(time.perf_counter() - started)
    print_tables(result)
    path = write_json(result, options.output)
    print(f"\n{path}")
    with if_matplotlib_is_there():
        from benchmarks.remedies.plot import plot

        print(plot(result, path.with_suffix(".png")))
    if path.parent == RESULTS and path.stem == "remedies_cpu" and not options.cases:
        DOCUMENT.write_text(document(result), encoding="utf-8")
        print(DOCUMENT)
    return 0


def measure(cases: Sequence[Case], seeds: Sequence[int], device: str) -> dict[str, Any]:
    """Accuracies without and with each remedy, by the remedy's heading."""
    without: dict[tuple[str, int, int], float] = {}
    measured: dict[str, Any] = {}
    for case in cases:
        scores = []
        for seed in seeds:
            key = case.program, case.steps, seed
            if key not in without:
                without[key] = _score(case, seed, device, mended=False)
            scores.append((without[key], _score(case, seed, device, mended=True)))
        program = case.build()
        remedy = case.remedy(program)
        print(f"{case.heading}: {[f'{a:.0f} -> {b:.0f}' for a, b in scores]}", file=sys.stderr)
        measured[case.heading] = {
            "program": case.program,
            "steps": case.steps,
            "chance": 100.0 / program.task.classes,
            "sentence": remedy.sentence,
            "code": remedy.code,
            "without": [round(before, 1) for before, _ in scores],
            "with": [round(after, 1) for _, after in scores],
        }
    return measured


def _score(case: Case, seed: int, device: str, *, mended: bool) -> float:
    torch.manual_seed(seed)
    program = case.build()
    if mended:
        case.apply(program, case.remedy(program).code)
    return train(program, case.steps, seed, device)
