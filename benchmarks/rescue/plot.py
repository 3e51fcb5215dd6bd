"""The result as a picture: score against learning rate, for every workload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.rescue.contenders import BARE, GUARD

_GUARD, _BARE, _PEER = "#0b6e4f", "#c0392b", "#b4b8bf"
_COLUMNS = 3


def plot_scores(result: Mapping[str, Any], path: Path) -> Path:
    """Draw the mean scores of all contenders; returns ``path``."""
    entries = [entry for entry in result["workloads"] if entry["target"] is not None]
    rows = max(math.ceil(len(entries) / _COLUMNS), 1)
    figure, grid = plt.subplots(
        rows, _COLUMNS, figsize=(11, 2.6 * rows), layout="constrained", squeeze=False
    )
    for axes, entry in zip(grid.flat, entries, strict=False):
        _draw(axes, entry)
    for axes in grid.flat[len(entries) :]:
        axes.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("score at the end of the run, mean over seeds", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw(axes: Axes, entry: Mapping[str, Any]) -> None:
    peers = [name for name in entry["contenders"] if name not in (GUARD, BARE)]
    for number, name in enumerate(peers):
        label = "peers" if number == 0 else None
        _line(axes, entry, name, color=_PEER, label=label, linewidth=0.9)
    for name, color in ((BARE, _BARE), (GUARD, _GUARD)):
        if name in entry["contenders"]:
            _line(axes, entry, name, color=color, label=name, linewidth=2.0, marker="o")
    axes.axhline(entry["target"], color="black", linewidth=0.7, linestyle=":", label="target")
    axes.set_title(f"{entry['workload']}, {entry['optimizer']}", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.set_xscale("log")


def _line(axes: Axes, entry: Mapping[str, Any], name: str, **style: Any) -> None:
    scores = [math.nan if s is None else s for s in entry["contenders"][name]["scores"]]
    axes.plot(entry["rates"], scores, markersize=3, **style)
