"""The result as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.modules.results import limit_of, title_of

_OURS, _OTHER, _LIMIT = "#0b6e4f", "#8a8f98", "#b3261e"
_WIDE = 30  # times; bars of more are drawn on a logarithmic scale
_THEIRS = ("nn.", "torchrecurrent")


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Draw time and memory of every contender, a row of panels for each case; returns ``path``."""
    cases, device = result["cases"], result["settings"]["device"]
    measured = [[row for row in case["rows"] if "time" in row] for case in cases]
    height = 1.4 + sum(0.6 + 0.24 * len(rows) for rows in measured)
    figure, panels = plt.subplots(
        len(cases),
        2,
        figsize=(12, height),
        sharey="row",
        squeeze=False,
        width_ratios=[1.5, 1],
        layout="constrained",
    )
    for (left, right), case, rows in zip(panels, cases, measured, strict=True):
        times = [row["time"]["median"] for row in rows]
        _draw(left, rows, times, [row["time"]["quartiles"] for row in rows])
        _draw(right, rows, [row.get("memory", math.nan) for row in rows], None)
        _draw_limits(left, rows, device)
        left.set_title(f"Time: {title_of(case)}", fontsize=9)
        right.set_title("Memory that a pass adds at its peak", fontsize=9)
    machine = result["machine"]
    figure.suptitle(
        f"Forward and backward pass, {machine.get('gpu', machine['cpu'])}, "
        f"torch {machine['packages']['torch']}, {machine['torch_threads']} thread",
        fontsize=10,
    )
    figure.supxlabel(
        "times the fused module of torch (the line at 1): median and quartiles of paired turns; "
        "red: aim",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    quartiles: Sequence[Sequence[float]] | None,
) -> None:
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        ours = not row["name"].startswith(_THEIRS)
        if math.isnan(value):
            continue
        axes.barh(place, value, color=_OURS if ours else _OTHER, height=0.62, alpha=0.85)
        end = value
        if quartiles is not None:
            axes.plot(quartiles[place], [place, place], color="#222222", linewidth=1.2)
            end = max(value, quartiles[place][1])
        axes.annotate(
            f"{value:.2f}",
            (end, place),
            xytext=(4, 0),
            fontsize=8,
            va="center",
            textcoords="offset points",
        )
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1, color="#222222", linewidth=0.8)
    if max(v for v in values if not math.isnan(v)) > _WIDE:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def _draw_limits(axes: Axes, rows: Sequence[Mapping[str, Any]], device: str) -> None:
    for place, row in enumerate(rows):
        limit = limit_of(row, device)
        if limit is not None:
            axes.vlines(limit, place - 0.42, place + 0.42, color=_LIMIT, linewidth=1.6)


def _label(row: Mapping[str, Any]) -> str:
    name = f"{row['name']}, {row['way']}" if row["way"] else str(row["name"])
    return f"{name} / {row['beside']}"
