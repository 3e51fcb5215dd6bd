"""The result as a table on the screen and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.overhead.results import RESULTS, print_table

__all__ = ["RESULTS", "print_tables", "write_json"]


def write_json(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``result``; the name tells the device."""
    settings = result["settings"]
    path = folder / f"remedies_{settings['device']}{'_quick' if settings['quick'] else ''}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def print_tables(result: Mapping[str, Any]) -> None:
    """Print what was measured."""
    machine, settings = result["machine"], result["settings"]
    print(f"{machine.get('gpu', machine['cpu'])}, torch {machine['packages']['torch']}")
    rows = [
        [heading, case["program"], in_words(case["without"]), in_words(case["with"])]
        for heading, case in result["cases"].items()
    ]
    title = f"Test accuracy in percent: median (lowest to highest) of {settings['seeds']} seeds"
    print_table(title, ["remedy", "program", "without", "with"], rows)


def in_words(scores: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(scores):.0f} ({min(scores):.0f} to {max(scores):.0f})"
