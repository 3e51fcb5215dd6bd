"""The result as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.overhead.contenders import CONTENDERS
from benchmarks.overhead.results import shown_name

_OURS = ("GradientMonitor", "GradGuard")
_COLORS = {True: "#0b6e4f", False: "#8a8f98"}


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Draw added time per step for each workload; returns ``path``."""
    times, clock = result["time"], result["settings"]["clock"]
    names = [n for n in CONTENDERS if any(n in entries for entries in times.values())][::-1]
    figure, panels = plt.subplots(
        1,
        len(times),
        figsize=(2.2 + 2.6 * len(times), 1.4 + 0.34 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (workload, entries) in zip(panels[0], times.items(), strict=True):
        _draw(axes, names, {n: entries[n][clock] for n in names if n in entries})
        axes.set_title(result["workloads"][workload]["summary"].replace(", ", "\n", 1), fontsize=9)
    panels[0][0].set_yticks(range(len(names)), [shown_name(n) for n in names], fontsize=9)
    settings, machine = result["settings"], result["machine"]
    figure.supxlabel(
        "added time per step, % of a bare Trainer (median and quartiles of paired turns; log scale "
        "beyond 10 %)",
        fontsize=9,
    )
    figure.suptitle(
        f"Cost per training step, {settings['optimizer']}, {machine.get('gpu', machine['cpu'])}, "
        f"torch {machine['packages']['torch']}, {machine['torch_threads']} thread",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw(axes: Axes, names: list[str], summaries: Mapping[str, Mapping[str, Any]]) -> None:
    for row, name in enumerate(names):
        if name not in summaries:
            axes.annotate("not run", (0, row), fontsize=7, color="#8a8f98", va="center")
            continue
        summary = summaries[name]
        added = 100 * (summary["median"] - 1)
        low, high = (100 * (q - 1) for q in summary["quartiles"])
        color = _COLORS[name in _OURS]
        axes.barh(row, added, color=color, height=0.62, alpha=0.85)
        axes.plot([low, high], [row, row], color="#222222", linewidth=1.2)
        axes.annotate(
            f"{added:+.1f}",
            (max(added, high, 0), row),
            xytext=(4, 0),
            fontsize=8,
            va="center",
            textcoords="offset points",
        )
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.axvline(2, color="#b3261e", linewidth=0.8, linestyle=":")
    axes.set_xscale("symlog", linthresh=10, linscale=2)
    axes.set_xlim(-5, 1000)
    axes.set_xticks([0, 2, 5, 10, 100], ["0", "2", "5", "10", "100"], fontsize=8)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
