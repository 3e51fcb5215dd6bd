"""The result as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_WITH, _WITHOUT, _CHANCE = "#0b6e4f", "#b3261e", "#8a8f98"


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Draw the accuracy without and with each remedy; returns ``path``."""
    cases, settings, machine = result["cases"], result["settings"], result["machine"]
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.38 * len(cases)), layout="constrained")
    for row, case in enumerate(cases.values()):
        _draw(axes, row, case)
    labels = [f"{heading}\n{case['program']}" for heading, case in cases.items()]
    axes.set_yticks(range(len(cases)), labels, fontsize=7.5)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(*_legend(axes), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)
    axes.set_xlabel(
        f"test accuracy, %: median and range of {settings['seeds']} seeds, "
        f"{machine.get('gpu', machine['cpu'])}, torch {machine['packages']['torch']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw(axes: Axes, row: int, case: Mapping[str, Any]) -> None:
    before, after = median(case["without"]), median(case["with"])
    axes.annotate(
        "",
        (after, row),
        (before, row),
        arrowprops={"arrowstyle": "->", "color": _CHANCE, "linewidth": 0.8},
    )
    for scores, color, name in (
        (case["without"], _WITHOUT, "without"),
        (case["with"], _WITH, "with the remedy"),
    ):
        axes.plot([min(scores), max(scores)], [row, row], color=color, linewidth=4, alpha=0.3)
        axes.plot(median(scores), row, "o", color=color, markersize=6, label=name)
    axes.plot(case["chance"], row, "|", color=_CHANCE, markersize=11, label="chance")


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, names = axes.get_legend_handles_labels()
    first = {name: handle for handle, name in reversed(list(zip(handles, names, strict=True)))}
    return list(first.values()), list(first)
