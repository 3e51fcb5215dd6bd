"""The picture of the demonstration: what happened in both runs, and accuracy by learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")  # a file is all that is wanted: no display is needed

import matplotlib.pyplot as plt
from figure_style import BLUE, GREEN, INK, ORANGE
from figure_style import STYLE as COMMON_STYLE
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpecFromSubplotSpec

if TYPE_CHECKING:
    from digits import Run

WITHOUT, WITH, BOUND = ORANGE, BLUE, GREEN
STYLE: Any = {
    **COMMON_STYLE,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.size": 9.5,
}
# One row of the strip below the curves for everything that can be found or done.
ROWS = {
    "finding": ("something found", "*"),
    "clip": ("gradient clipped", "|"),
    "cap": ("update capped", "|"),
    "tighten": ("cap tightened", "v"),
    "back_off": ("learning rate cut", "X"),
    "recover": ("learning rate recovered", "^"),
    "skip": ("step skipped", "s"),
    "roll_back": ("weights put back", "<"),
    "stop": ("run stopped", "P"),
}


def save_figure(runs: Sequence[Run], swept: Sequence[Run], path: Path) -> None:
    """Draw loss, gradient norm and events of both runs, and the sweep beside them if there is one.

    Args:
        runs: The run without and the run with the guard.
        swept: All runs of the sweep; may be empty.
        path: Where the PNG goes.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12.5 if swept else 8.0, 7.0), layout="constrained")
        grid = figure.add_gridspec(1, 2 if swept else 1, width_ratios=[1.6, 1] if swept else [1])
        events = rows_of(runs)
        heights = [3, 3, 1.3, 0.25 * max(len(events), 2) + 0.2]
        left = GridSpecFromSubplotSpec(4, 1, grid[0], height_ratios=heights)
        loss = figure.add_subplot(left[0])
        norm, cap, strip = (figure.add_subplot(left[row], sharex=loss) for row in (1, 2, 3))
        draw_loss(loss, runs)
        draw_norm(norm, runs)
        draw_cap(cap, runs)
        draw_events(strip, events)
        for axes in (loss, norm, cap):
            axes.tick_params(labelbottom=False)
        strip.set_xlabel("optimizer step")
        if swept:
            draw_sweep(figure.add_subplot(grid[1]), swept, runs[0].rate)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def color(run: Run) -> str:
    return WITH if run.guarded else WITHOUT


def name(run: Run) -> str:
    return "with the guard" if run.guarded else "without"


def draw_loss(axes: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        steps = [row.step for row in run.history]
        losses = [math.nan if row.loss is None else row.loss for row in run.history]
        label = f"{name(run)}: test accuracy {run.accuracy:.3f}"
        axes.plot(steps, losses, color=color(run), linewidth=0.9, label=label)
    axes.axhline(math.log(10), color=INK, linewidth=0.9, linestyle=":", label="guessing")
    axes.set_yscale("log")
    axes.set_ylabel("training loss")
    axes.set_title(f"The same run twice, at learning rate {runs[0].rate:g}", pad=24)
    legend_above(axes)


def draw_norm(axes: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        steps = [row.step for row in run.history]
        norms = [row.total_norm or math.nan for row in run.history]  # 0 has no place on a log axis
        axes.plot(steps, norms, color=color(run), linewidth=0.9, label=name(run))
        bounds = [row.clip_threshold for row in run.history]
        if any(map(math.isfinite, bounds)):
            shown = [bound if math.isfinite(bound) else math.nan for bound in bounds]
            axes.plot(steps, shown, color=INK, linewidth=1.4, linestyle="--", label="clipped to")
    axes.set_yscale("log")
    axes.set_ylabel("gradient norm\nbefore clipping")
    legend_above(axes)


def draw_cap(axes: Axes, runs: Sequence[Run]) -> None:
    """The largest step that the guard lets a tensor take, relative to the tensor's own norm."""
    axes.set_ylabel("largest\nupdate, %")
    capped = [run for run in runs if any(math.isfinite(row.max_ratio) for row in run.history)]
    if not capped:
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "nothing was capped", transform=axes.transAxes, ha="center", va="center"
        )
        return
    for run in capped:
        steps = [row.step for row in run.history]
        caps = [
            100 * row.max_ratio if math.isfinite(row.max_ratio) else math.nan for row in run.history
        ]
        axes.plot(steps, caps, color=color(run), linewidth=1.4)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def rows_of(runs: Sequence[Run]) -> list[tuple[str, str, str, list[int]]]:
    """Label, marker, color and steps of every row of the strip that has anything in it."""
    rows = []
    for run in runs:
        steps: dict[str, list[int]] = {key: [] for key in ROWS}
        steps["finding"] = [finding.step for finding in run.findings]
        if run.guarded:
            steps["clip"] = [row.step for row in run.history if 0.0 < row.clip_coef < 1.0]
            steps["cap"] = [row.step for row in run.history if row.capped_tensors > 0]
        for action in run.actions:
            steps[action.kind.value].append(action.step)
        for key, (label, marker) in ROWS.items():
            if steps[key]:
                rows.append((label, marker, color(run), steps[key]))
    return rows


def draw_events(axes: Axes, rows: Sequence[tuple[str, str, str, list[int]]]) -> None:
    for height, (_, marker, shade, steps) in enumerate(rows):
        size = 60 if marker == "*" else 34
        axes.scatter(steps, [height] * len(steps), s=size, marker=marker, color=shade, linewidths=1)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    for text, (_, _, shade, _) in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_color(shade)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def draw_sweep(axes: Axes, swept: Sequence[Run], chosen: float) -> None:
    rates = sorted({run.rate for run in swept})
    axes.set_xscale("log")  # before anything is drawn: a single rate has no width to rescale
    for guarded, marker in ((False, "s"), (True, "o")):
        runs = [run for run in swept if run.guarded is guarded]
        axes.plot(
            [run.rate for run in runs],
            [run.accuracy for run in runs],
            color=color(runs[0]),
            marker=marker,
            label=name(runs[0]),
        )
    axes.axhline(0.1, color=INK, linewidth=0.9, linestyle=":", label="guessing")
    axes.axvline(chosen, color=INK, linewidth=0.9, linestyle="--", label="shown on the left")
    axes.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("test accuracy")
    axes.set_title("Accuracy by learning rate", pad=40)
    legend_above(axes, columns=2)


def legend_above(axes: Axes, columns: int = 3) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handlelength=1.6,
    )
