"""The result as tables on the screen and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.overhead.contenders import BARE, CONTENDERS

RESULTS = Path(__file__).parents[1] / "results"
RE_IMPLEMENTED = ("AutoClip", "AGC")


def shown_name(contender: str) -> str:
    """Name with a mark where the contender is not the peer's own code."""
    return f"{contender} (re-impl.)" if contender in RE_IMPLEMENTED else contender


def write_json(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``result``; the name tells the device and the optimizer."""
    settings = result["settings"]
    quick = "_quick" if settings["quick"] else ""
    path = folder / f"overhead_{settings['device']}_{settings['optimizer']}{quick}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def print_tables(result: Mapping[str, Any]) -> None:
    """Print what was measured."""
    machine, settings = result["machine"], result["settings"]
    hardware = machine.get("gpu", machine["cpu"])
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    print(f"{hardware}, {machine['torch_threads']} thread; {versions}")
    print(f"optimizer {settings['optimizer']}, lr {settings['learning_rate']}")
    for name, facts in result["workloads"].items():
        print(f"  {name}: {facts['summary']}, {facts['tensors']} tensors")
    if "time" in result:
        _print_time(result)
    if "memory" in result:
        _print_memory(result)
    if "counts" in result:
        _print_counts(result)
    for name in result["not_installed"]:
        print(f"{name}: not installed")


def _print_time(result: Mapping[str, Any]) -> None:
    clock, workloads = result["settings"]["clock"], list(result["time"])
    rows = []
    for name in _names(result["time"]):
        cells = []
        for workload in workloads:
            entry = result["time"][workload].get(name)
            cells.append(_ratio(entry[clock]) if entry else "-")
        rows.append([shown_name(name), *cells])
    title = f"Time, ratio to a bare Trainer ({clock} time): median [quartiles] with logging"
    print_table(title, ["", *workloads], rows)


def _ratio(summary: Mapping[str, Any]) -> str:
    low, high = summary["quartiles"]
    text = f"{summary['median']:.3f} [{low:.3f} {high:.3f}]"
    logging = summary["with_logging"]
    return text if logging is None else f"{text} {logging:.3f}"


def _print_memory(result: Mapping[str, Any]) -> None:
    workloads = list(result["memory"])
    rows = []
    for name in _names(result["memory"]):
        cells = []
        for workload in workloads:
            peaks = result["memory"][workload]
            if name not in peaks:
                cells.append("-")
            elif name == BARE:
                cells.append(f"{peaks[name] / 2**20:.1f} MiB")
            else:
                cells.append(f"{peaks[name] / peaks[BARE]:.3f}")
        rows.append([shown_name(name), *cells])
    title = "Peak memory, ratio to a bare Trainer (first steps included)"
    print_table(title, ["", *workloads], rows)


def _print_counts(result: Mapping[str, Any]) -> None:
    columns = [(o, n) for o, sizes in result["counts"].items() for n in sizes]
    rows = []
    for name in _names({f"{o}{n}": result["counts"][o][n] for o, n in columns}):
        cells = []
        for optimizer, tensors in columns:
            entry = result["counts"][optimizer][tensors].get(name)
            cells.append(_counts(entry) if entry else "-")
        rows.append([shown_name(name), *cells])
    title = "Added to a healthy step: aten calls / host reads (most in any counted step)"
    print_table(title, ["", *(f"{o} {n}" for o, n in columns)], rows)


def _counts(entry: Mapping[str, float]) -> str:
    usual = f"{entry['aten_calls']:g} / {entry['host_reads']:g}"
    most = f"{entry['aten_calls_most']:g} / {entry['host_reads_most']:g}"
    return usual if usual == most else f"{usual} ({most})"


def _names(by_workload: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [name for name in CONTENDERS if any(name in row for row in by_workload.values())]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
