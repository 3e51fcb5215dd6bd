"""The result as tables on the screen and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.overhead.results import RESULTS, print_table

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ABSENT", "RESULTS", "limit_of", "print_tables", "verdicts", "write_json"]

ABSENT = "not installed"

# Times the fused module of torch: a cell on either device, the dilated module layer by layer.
TARGETS = {"cpu": {"cell": 2.0, "dilated": 1.0}, "cuda": {"cell": 3.0, "dilated": 1.0}}


def limit_of(row: Mapping[str, Any], device: str) -> float | None:
    """What the row's ratio of time has to stay at or below; ``None`` if it has no such aim."""
    return TARGETS[device].get(row["target"]) if row["target"] else None


def verdicts(rows: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """For each contender with an aim its best way to run, and whether that meets the aim."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["target"] and "time" in row:
            so_far = best.setdefault(row["name"], row)
            if row["time"]["median"] < so_far["time"]["median"]:
                best[row["name"]] = row
    return [
        {
            "name": name,
            "way": row["way"] or "as it is",
            "ratio": row["time"]["median"],
            "limit": limit_of(row, device),
            "met": row["time"]["median"] <= (limit_of(row, device) or 0.0),
        }
        for name, row in best.items()
    ]


def write_json(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``result``; the name tells the device."""
    settings = result["settings"]
    quick = "_quick" if settings["quick"] else ""
    path = folder / f"modules_{settings['device']}{quick}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def print_tables(result: Mapping[str, Any]) -> None:
    """Print what was measured, and which aims are met."""
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    print(f"{machine.get('gpu', machine['cpu'])}, {machine['torch_threads']} thread; {versions}")
    print(
        "Forward and backward pass, ratio to the fused module of torch of the same sizes: medians "
        f"[quartiles] of paired turns, {settings['clock']} time"
    )
    for case in result["cases"]:
        _print_case(case, settings["device"])


def title_of(case: Mapping[str, Any]) -> str:
    """Its sizes."""
    return (
        f"T={case['timesteps']}, B={case['sequences']}, input {case['input_size']}, "
        f"hidden {case['hidden_size']}, {case['dtype']}"
    )


def _print_case(case: Mapping[str, Any], device: str) -> None:
    table = [_cells(row, device) for row in case["rows"]]
    print_table(title_of(case), ["", "beside", "time", "", "at most", "", "memory", ""], table)
    for row in case["rows"]:
        if row["why_not"] not in ("", ABSENT):
            print(f"{row['name']}, {row['way']}: {row['why_not']}")
    apart = max((row.get("apart", 0.0) for row in case["rows"]), default=0.0)
    if apart:
        print(f"Graphs differ from the modules by {apart:.1e} at most, output and input gradient")
    found = verdicts(case["rows"], device)
    met = [verdict for verdict in found if verdict["met"]]
    print(f"{len(met)} of {len(found)} aims are met" + ("" if len(met) == len(found) else "; not:"))
    for verdict in found:
        if not verdict["met"]:
            print(
                f"  {verdict['name']}, {verdict['way']}: {verdict['ratio']:.2f}, "
                f"at most {verdict['limit']:g}"
            )


def _cells(row: Mapping[str, Any], device: str) -> list[str]:
    name = f"{row['name']}, {row['way']}" if row["way"] else row["name"]
    if "time" not in row:
        absent = row["why_not"] == ABSENT
        return [name, row["beside"], ABSENT if absent else "fails, see below", *[""] * 5]
    time, limit = row["time"], limit_of(row, device)
    low, high = time["quartiles"]
    verdict = "" if limit is None else "met" if time["median"] <= limit else "missed"
    known = "memory" in row
    return [
        name, row["beside"], f"{time['median']:.2f} [{low:.2f} {high:.2f}]",
        f"{time['step_ms']:.1f} ms", "" if limit is None else f"{limit:g}", verdict,
        f"{row['memory']:.2f}" if known else "-",
        f"{row['bytes'] / 2**20:.1f} MiB" if known else "-",
    ]  # fmt: skip
