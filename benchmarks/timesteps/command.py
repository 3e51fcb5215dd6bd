"""``python -m benchmarks timesteps``."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.options import add_shape, check_device, check_shape
from benchmarks.overhead.command import quiet, say
from benchmarks.overhead.timing import Schedule
from benchmarks.overhead.turns import share_one_heap
from benchmarks.pictures import if_matplotlib_is_there
from benchmarks.timesteps import trainer
from benchmarks.timesteps.agreement import compare_gradients, compare_rates
from benchmarks.timesteps.memory import peak_memory
from benchmarks.timesteps.models import FUSED, Shape, Task
from benchmarks.timesteps.results import RESULTS, print_tables, share_of_run, write_json
from benchmarks.timesteps.timing import compare
from benchmarks.timesteps.variants import CHEAP, EXACT, PLAIN, cheap, exact, plain, unrolled
from lightning_gradguard.sampling import CHEAP_EVERY_N_STEPS, EXACT_EVERY_N_STEPS

SHAPES = {"cpu": Shape(100, 32, 32, 128), "cuda": Shape(512, 32, 128, 512)}
# A percent is looked for in the first one, multiples in the second, a whole interval of steps
# between exact measurements in the last one.
SCHEDULES = {
    "cheap": Schedule(warm_steps=20, rounds=32, steps=4),
    "exact": Schedule(warm_steps=5, rounds=12, steps=2),
    "trainer": Schedule(warm_steps=35, rounds=10, steps=CHEAP_EVERY_N_STEPS),
    "interval": Schedule(warm_steps=60, rounds=5, steps=EXACT_EVERY_N_STEPS),
}
QUICK = {
    "cheap": Schedule(warm_steps=5, rounds=8, steps=2),
    "exact": Schedule(warm_steps=2, rounds=4, steps=1),
    "trainer": Schedule(warm_steps=30, rounds=4, steps=5),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few rounds, and no whole interval")
    parser.add_argument("--kinds", nargs="+", choices=tuple(FUSED), default=list(FUSED))
    usual = (f"on {device} {shape}" for device, shape in SHAPES.items())
    add_shape(parser, f"default {'; '.join(usual)}")
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(_PARTS), default=list(_PARTS), help="default: all"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write."""
    check_device(options)
    check_shape(options)
    one_heap = share_one_heap()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "benchmark": "timesteps",
        "machine": describe_machine(options.device),
        "settings": {
            "device": options.device,
            "quick": options.quick,
            "shape": _shape(options)._asdict(),
            # Other processes may share the cores: processor time does not see them.
            "clock": "wall" if options.device == "cuda" else "cpu",
            "one_heap_for_all_threads": one_heap,
            "schedules": {name: vars(schedule) for name, schedule in _schedules(options).items()},
        },
    }
    started = time.perf_counter()
    with quiet(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        for part in options.parts:
            _PARTS[part](options, Path(directory), result)
    result["share"] = share_of_run(result)
    result["settings"]["seconds"] = round(time.perf_counter() - started)
    say("")
    print_tables(result)
    path = write_json(result, options.output)
    print(f"\n{path}")
    with if_matplotlib_is_there():
        from benchmarks.timesteps.plot import plot

        if "cheap" in result and "exact" in result:
            print(plot(result, path.with_suffix(".png")))
    return 0


def _measure_cheap(options: argparse.Namespace, directory: Path, result: dict[str, Any]) -> None:
    schedule = _schedules(options)["cheap"]
    result["cheap"] = {
        kind: {
            inputs: compare(
                Task(kind, _shape(options), options.device, inputs), variants, schedule, say
            )
            for inputs, variants in CHEAP.items()
        }
        for kind in options.kinds
    }


def _measure_exact(options: argparse.Namespace, directory: Path, result: dict[str, Any]) -> None:
    schedule = _schedules(options)["exact"]
    result["exact"] = {
        kind: compare(Task(kind, _shape(options), options.device), EXACT, schedule, say)
        for kind in options.kinds
    }


def _measure_trainer(options: argparse.Namespace, directory: Path, result: dict[str, Any]) -> None:
    schedules = _schedules(options)
    for part, exact_too in (("trainer", False), ("interval", True)):
        if part not in schedules:
            continue
        result[part] = {
            kind: trainer.compare(
                kind,
                _shape(options),
                schedules[part],
                exact=exact_too,
                device=options.device,
                directory=directory / part / kind,
                say=say,
            )
            for kind in options.kinds
        }


def _measure_memory(options: argparse.Namespace, directory: Path, result: dict[str, Any]) -> None:
    variants = {PLAIN: plain, "cheap": cheap, "exact": exact, "unrolled": unrolled}
    result["memory"] = {}
    for kind in options.kinds:
        say(f"{kind}: memory")
        task = Task(kind, _shape(options), options.device)
        result["memory"][kind] = {
            name: peak_memory(task, variant) for name, variant in variants.items()
        }


def _check(options: argparse.Namespace, directory: Path, result: dict[str, Any]) -> None:
    result["agreement"] = {}
    for kind in options.kinds:
        say(f"{kind}: agreement")
        task = Task(kind, _shape(options), options.device)
        result["agreement"][kind] = {
            "gradients": compare_gradients(task),
            "decay_rate": compare_rates(task),
        }


_PARTS: dict[str, Callable[[argparse.Namespace, Path, dict[str, Any]], None]] = {
    "agreement": _check,
    "memory": _measure_memory,
    "exact": _measure_exact,
    "cheap": _measure_cheap,
    "trainer": _measure_trainer,
}


def _shape(options: argparse.Namespace) -> Shape:
    return Shape(*options.shape) if options.shape else SHAPES[options.device]


def _schedules(options: argparse.Namespace) -> dict[str, Schedule]:
    return QUICK if options.quick else SCHEDULES
