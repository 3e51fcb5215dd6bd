"""``python -m benchmarks modules``."""

from __future__ import annotations

import argparse
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.modules.contenders import PEER
from benchmarks.modules.measuring import Setting, measure
from benchmarks.modules.results import RESULTS, print_tables, verdicts, write_json
from benchmarks.options import add_shape, check_device, check_shape
from benchmarks.overhead.command import quiet, say
from benchmarks.overhead.timing import Schedule
from benchmarks.overhead.turns import share_one_heap
from benchmarks.pictures import if_matplotlib_is_there
from benchmarks.timesteps.models import FUSED, Shape

# On the GPU the sizes that FlashRNN (Poeppel et al. 2024) publishes its own times for.
SETTINGS = {
    "cpu": (
        Setting(Shape(100, 32, 64, 128), torch.float32, Schedule(5, rounds=16, steps=2)),
        Setting(Shape(1000, 32, 64, 128), torch.float32, Schedule(1, rounds=7, steps=1)),
    ),
    "cuda": (Setting(Shape(1024, 16, 768, 768), torch.float16, Schedule(3, rounds=5, steps=2)),),
}
QUICK = {"cpu": Schedule(2, rounds=5, steps=1), "cuda": Schedule(2, rounds=3, steps=2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few rounds, of the first sizes only")
    parser.add_argument("--kinds", nargs="+", choices=tuple(FUSED), default=list(FUSED))
    usual = (f"on {d} {' and '.join(str(s.shape) for s in all_)}" for d, all_ in _all())
    add_shape(parser, f"instead of {'; '.join(usual)}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write."""
    check_device(options)
    check_shape(options)
    one_heap = share_one_heap()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "benchmark": "modules",
        "machine": _machine(options.device),
        "settings": {
            "device": options.device,
            "quick": options.quick,
            # Other processes may share the cores: processor time does not see them.
            "clock": "wall" if options.device == "cuda" else "cpu",
            "one_heap_for_all_threads": one_heap,
        },
        "cases": [],
    }
    started = time.perf_counter()
    for setting in _settings(options):
        with quiet():  # of torch, about the streams of graphs
            rows = measure(setting, options.kinds, options.device, say)
        found = verdicts(rows, options.device)
        result["cases"].append({**setting.to_dict(), "rows": rows, "targets": found})
    result["settings"]["seconds"] = round(time.perf_counter() - started)
    say("")
    print_tables(result)
    path = write_json(result, options.output)
    print(f"\n{path}")
    with if_matplotlib_is_there():
        from benchmarks.modules.plot import plot

        print(plot(result, path.with_suffix(".png")))
    return 0


def _machine(device: str) -> dict[str, Any]:
    machine = describe_machine(device)
    try:
        machine["packages"][PEER] = metadata.version(PEER)
    except metadata.PackageNotFoundError:
        machine["packages"][PEER] = None
    return machine


def _all() -> list[tuple[str, tuple[Setting, ...]]]:
    return list(SETTINGS.items())


def _settings(options: argparse.Namespace) -> tuple[Setting, ...]:
    first, *others = SETTINGS[options.device]
    schedule = QUICK[options.device] if options.quick else first.schedule
    if options.shape or options.quick:
        shape = Shape(*options.shape) if options.shape else first.shape
        return (Setting(shape, first.dtype, schedule),)
    return (first, *others)
