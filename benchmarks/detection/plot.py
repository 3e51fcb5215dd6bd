"""The result as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from benchmarks.detection.judging import HEALTHY, OURS
from benchmarks.detection.results import shown_name

_OURS, _OTHER = "#0b6e4f", "#8a8f98"
_PANELS = {"f1": "F1 of runs", "macro_f1": "macro-F1 of the named cause"}


def plot_scores(result: Mapping[str, Any], path: Path) -> Path:
    """Draw both F1 of all detectors, each side of the split in a row; returns ``path``."""
    sides = result["sides"]
    rows = max(len(side["detectors"]) for side in sides.values())
    figure, grid = plt.subplots(
        len(sides),
        len(_PANELS),
        figsize=(11, len(sides) * (0.9 + 0.27 * rows)),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    for axes_of_side, (name, side) in zip(grid, sides.items(), strict=True):
        for axes, (metric, title) in zip(axes_of_side, _PANELS.items(), strict=True):
            _draw_scores(axes, side["detectors"], metric)
            axes.set_title(f"{title}, {name.replace('_', '-')} programs", fontsize=9)
    figure.suptitle(_title(result), fontsize=10)
    figure.supxlabel("95 % intervals: bootstrap over families of programs and seeds", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_scores(axes: Axes, detectors: Mapping[str, Any], metric: str) -> None:
    names = sorted(detectors, key=lambda name: -(detectors[name]["f1"]["value"] or 0.0))
    for row, name in enumerate(names):
        estimate = detectors[name][metric]
        color = _OURS if name == OURS else _OTHER
        if estimate["low"] is not None:
            axes.plot([estimate["low"], estimate["high"]], [row, row], color=color, linewidth=1.6)
        if estimate["value"] is not None:
            axes.plot(estimate["value"], row, "o", color=color, markersize=6)
            axes.annotate(
                f"{estimate['value']:.2f}",
                (estimate["value"], row),
                xytext=(0, 5),
                fontsize=7,
                ha="center",
                textcoords="offset points",
            )
    axes.set_yticks(range(len(names)), [shown_name(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.set_xlim(-0.03, 1.03)
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def plot_confusion(result: Mapping[str, Any], path: Path) -> Path:
    """Draw which class our findings put each run in, on each side of the split."""
    sides = result["sides"]
    figure, grid = plt.subplots(
        1, len(sides), figsize=(7.2 * len(sides), 6.4), layout="constrained", squeeze=False
    )
    for axes, (name, side) in zip(grid[0], sides.items(), strict=True):
        _draw_confusion(axes, side["confusion"][OURS])
        axes.set_title(f"{name.replace('_', '-')} programs", fontsize=9)
    figure.suptitle(f"{OURS}: {_title(result)}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_confusion(axes: Axes, table: Mapping[str, Mapping[str, int]]) -> None:
    labels = sorted(table, key=lambda name: (name == HEALTHY, name))
    predicted = {name for row in table.values() for name in row}
    # What was named and is no label stands apart, at the right end.
    columns = labels + sorted(predicted - set(labels))
    for row, label in enumerate(labels):
        total = sum(table[label].values())
        for column, name in enumerate(columns):
            count = table[label].get(name, 0)
            if count:
                share = count / total
                color = _OURS if name == label else "#b3261e"
                axes.add_patch(
                    Rectangle(
                        (column - 0.5, row - 0.5), 1, 1, color=color, alpha=0.15 + 0.7 * share
                    )
                )
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8)
    names = [name.replace("_", " ") for name in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=7, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), [n.replace("_", " ") for n in labels], fontsize=7)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("named", fontsize=8)
    axes.set_ylabel("label", fontsize=8)
    axes.tick_params(length=0)


def _title(result: Mapping[str, Any]) -> str:
    runs = {name: side["runs"] for name, side in result["sides"].items()}
    failing = sum(side["failing"] for side in runs.values())
    healthy = sum(side["healthy"] for side in runs.values())
    programs = sum(side["programs"] for side in runs.values())
    return f"findings of {programs} programs, {failing} failing and {healthy} healthy runs"
