"""The result as tables on the screen and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.overhead.results import RESULTS, print_table
from lightning_gradguard.sampling import CHEAP_EVERY_N_STEPS, EXACT_EVERY_N_STEPS

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RESULTS", "TARGETS", "print_tables", "share_of_run", "write_json"]

# Of the cheap measurement beside a step; of an exact one in steps; of both in a run, in percent.
TARGETS = {"cheap": 1.02, "exact": 2.0, "share": 1.0}


def write_json(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``result``; the name tells the device."""
    settings = result["settings"]
    quick = "_quick" if settings["quick"] else ""
    path = folder / f"timesteps_{settings['device']}{quick}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def share_of_run(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the default adds to a run, in percent of plain training in a bare loop.

    A sleeping probe on every step, the cheap measurement at its interval, and in place of some of
    those an exact one.
    """
    if "cheap" not in result or "exact" not in result:
        return {}
    clock = result["settings"]["clock"]
    shares: dict[str, dict[str, float]] = {}
    for kind, by_inputs in result["cheap"].items():
        exact = result["exact"][kind]["exact"][clock]["median"]
        shares[kind] = {}
        for inputs, entries in by_inputs.items():
            asleep, read = (entries[name][clock]["median"] for name in ("asleep", "cheap_read"))
            added = asleep - 1 + (read - asleep) / CHEAP_EVERY_N_STEPS
            shares[kind][inputs] = 100 * (added + (exact - read) / EXACT_EVERY_N_STEPS)
    return shares


def print_tables(result: Mapping[str, Any]) -> None:
    """Print what was measured."""
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    print(
        f"{machine.get('gpu', machine['cpu'])}, {machine['torch_threads']} thread, "
        f"python {machine['python']}; {versions}"
    )
    sizes = ", ".join(f"{name} {size}" for name, size in settings["shape"].items())
    print(f"{sizes}; ratios are medians [quartiles] of paired turns, {settings['clock']} time")
    for part, show in _TABLES.items():
        if result.get(part):
            show(result)


def _print_cheap(result: Mapping[str, Any]) -> None:
    clock, by_kind = result["settings"]["clock"], result["cheap"]
    columns = ("control", "asleep", "input_gradient", "cheap", "cheap_read")
    rows = [
        [
            f"{kind}, {inputs}",
            *(_ratio(entries[name][clock]) if name in entries else "-" for name in columns),
        ]
        for kind, by_inputs in by_kind.items()
        for inputs, entries in by_inputs.items()
    ]
    header = ["", "plain again", "asleep", "input gradient only", "cheap, every step", "and read"]
    print_table(
        f"Cheap: step of a bare loop, ratio to a plain one (cheap: at most {TARGETS['cheap']})",
        header,
        rows,
    )


def _print_trainer(result: Mapping[str, Any]) -> None:
    _print_guards(
        result,
        "trainer",
        f"Cheap, in a Trainer with AdamW: GradGuard, ratio (at most {TARGETS['cheap']})",
    )


def _print_interval(result: Mapping[str, Any]) -> None:
    steps = result["settings"]["schedules"]["interval"]["steps"]
    _print_guards(
        result,
        "interval",
        f"By default, in a Trainer with AdamW: GradGuard, ratio over {steps} steps, one exact",
    )


def _print_guards(result: Mapping[str, Any], part: str, title: str) -> None:
    clock = result["settings"]["clock"]
    rows = [
        [kind, *(_ratio(entries[name][clock]) for name in ("control", "auto"))]
        for kind, entries in result[part].items()
    ]
    print_table(
        f"{title}, to timesteps=None: median [quartiles] with logging",
        ["", "None again", '"auto"'],
        rows,
    )


def _print_exact(result: Mapping[str, Any]) -> None:
    clock = result["settings"]["clock"]
    rows = [
        [
            kind,
            f"{entries['exact'][clock]['step_ms']:.1f} ms",
            _ratio(entries["exact"][clock], less=1),
            _ratio(entries["adjoint"][clock]),
            _ratio(entries["unrolled"][clock]),
        ]
        for kind, entries in result["exact"].items()
    ]
    title = (
        f"Exact: in plain training steps (one exact measurement: at most {TARGETS['exact']}; "
        "cells: instead of the fused module)"
    )
    header = ["", "step with it", "exact, on top", "adjoint alone, all", "step of unrolled cells"]
    print_table(title, header, rows)


def _print_share(result: Mapping[str, Any]) -> None:
    rows = [
        [kind, *(f"{share:.2f} %" for share in shares.values())]
        for kind, shares in result["share"].items()
    ]
    header = ["", *next(iter(result["share"].values()))]
    title = f"By default, in a bare loop: share of the run (at most {TARGETS['share']} %)"
    print_table(title, header, rows)


def _print_memory(result: Mapping[str, Any]) -> None:
    rows = [
        [
            kind,
            f"{peaks['plain'] / 2**20:.1f} MiB",
            *(f"{peaks[name] / peaks['plain']:.3f}" for name in ("cheap", "exact", "unrolled")),
        ]
        for kind, peaks in result["memory"].items()
    ]
    title = "Peak memory of a step, ratio to a plain one"
    print_table(title, ["", "plain", "cheap", "exact", "unrolled cells"], rows)


def _print_agreement(result: Mapping[str, Any]) -> None:
    rows = []
    for kind, found in result["agreement"].items():
        gradients, rates = found["gradients"], found["decay_rate"]
        exact, cheap = rates["exact"], rates["cheap"]
        known = exact is not None and cheap is not None
        rows.append(
            [
                kind,
                f"{gradients['hidden']:.1e}",
                "-" if gradients["cell"] is None else f"{gradients['cell']:.1e}",
                str(gradients["timesteps"]),
                *("-" if rate is None else f"{rate:.4f}" for rate in (exact, cheap)),
                f"{100 * abs(cheap / exact - 1):.2f} %" if known else "-",
            ]
        )
    title = (
        "Agreement: largest relative difference to unrolled cells at any timestep with a gradient; "
        "decay rates"
    )
    print_table(title, ["", "dL/dh", "dL/dc", "timesteps", "exact", "cheap", "apart"], rows)
    for kind, found in result["agreement"].items():
        for note in found["decay_rate"]["notes"]:
            print(f"{kind}, {note}")


def _ratio(summary: Mapping[str, Any], less: float = 0.0) -> str:
    low, median, high = (
        value - less
        for value in (summary["quartiles"][0], summary["median"], summary["quartiles"][1])
    )
    text = f"{median:.3f} [{low:.3f} {high:.3f}]"
    logging = summary["with_logging"]
    return text if logging is None else f"{text} {logging:.3f}"


_TABLES = {
    "cheap": _print_cheap,
    "trainer": _print_trainer,
    "exact": _print_exact,
    "share": _print_share,
    "interval": _print_interval,
    "memory": _print_memory,
    "agreement": _print_agreement,
}
