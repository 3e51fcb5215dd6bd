"""The result as a picture: progress against horizon, and a grid of models and tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.memory.results import task_names
from benchmarks.memory.scoring import WHEN
from benchmarks.memory.tasks import workload_named

_COLORS = ("#0b6e4f", "#c0392b", "#2c6fbb", "#b8860b", "#6c3483")
_MARKERS = ("o", "s", "^", "D", "v")
# Beyond it a horizon is as good as endless.
_LONGEST = 100.0
# The shade from which on a black letter is hard to read.
_DARK = 0.6


def plot_memory(result: Mapping[str, Any], path: Path) -> Path:
    """Draw both; returns ``path``."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure, axes = plt.subplots(
        1,
        3,
        figsize=(13, max(2.5 + 0.28 * len(models), 4.0)),
        layout="constrained",
        width_ratios=(1, 1, 1.2),
    )
    for left, when in zip(axes, WHEN, strict=False):
        _scatter(left, result, when)
    axes[0].set_ylabel("progress towards the target", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    _grid(axes[2], result, models)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _scatter(axes: Axes, result: Mapping[str, Any], when: str) -> None:
    for number, task in enumerate(task_names(result)):
        workload = workload_named(task)
        points = [
            (
                min((math.inf if h is None else h) / workload.timesteps, _LONGEST),
                workload.progress(_number(v)),
            )
            for row in result["rows"]
            if row["task"] == task
            for rate, h, v in zip(
                row[when]["rates"], row[when]["horizons"], row["values"], strict=True
            )
            if rate is not None and not math.isnan(rate)
        ]
        axes.plot(
            *zip(*points, strict=True) if points else ((), ()),
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            color=_COLORS[number % len(_COLORS)],
            markersize=4,
            alpha=0.7,
            label=task,
        )
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.7, linestyle=":")
    axes.set_ylim(-0.05, 1.05)
    axes.set_title(f"{when} training", fontsize=9)
    axes.set_xlabel("horizon / length", fontsize=9)
    axes.tick_params(labelsize=7)


def _grid(axes: Axes, result: Mapping[str, Any], models: list[str]) -> None:
    tasks = task_names(result)
    cells = {(row["task"], row["model"]): row for row in result["rows"]}
    progress = [
        [_number(cells[t, m]["progress"]) if (t, m) in cells else math.nan for t in tasks]
        for m in models
    ]
    axes.imshow(progress, vmin=0.0, vmax=1.0, cmap="YlGn", aspect="auto")
    for y, model in enumerate(models):
        for x, task in enumerate(tasks):
            row = cells.get((task, model))
            if row is not None:
                text = f"{progress[y][x]:.2f}\n{row['solved']} of {row['seeds']}"
                color = "white" if progress[y][x] > _DARK else "black"
                axes.text(x, y, text, ha="center", va="center", fontsize=6, color=color)
    axes.set_xticks(range(len(tasks)), tasks, fontsize=7, rotation=20)
    axes.set_yticks(range(len(models)), models, fontsize=7)
    axes.set_title("progress, and seeds that reach the target", fontsize=9)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
