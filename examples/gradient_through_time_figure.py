"""The picture of how the gradient travels through time: heat maps, decay curves and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # a file is all that is wanted: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from digits_figures import STYLE
from figure_style import BLUE, GREEN, INK, ORANGE, PINK
from gradient_through_time_nets import FACTOR, LAG, Net, reached, relative
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lightning_gradguard.readings import HORIZON_FACTOR, TimeReading

# A line style each, for print.
LINES: dict[str, dict[str, Any]] = {
    "tanh RNN": {"color": ORANGE},
    "ReLU RNN": {"color": PINK, "linestyle": (0, (6, 1.5))},
    "LSTM": {"color": BLUE, "linestyle": (0, (9, 1.2, 1.5, 1.2))},
    "GRU": {"color": GREEN, "linestyle": (0, (3, 1))},
    "linear RNN": {"color": INK, "linestyle": ":"},
}
DARKEST, BRIGHTEST = 1e-8, 1e-1
LOWEST, HIGHEST = 1e-15, 1e2  # of the decay curves
COLUMNS = (0.585, 0.795, 1.0)  # right edges
CAPTION = (
    "Gradient norm of each timestep while the net trains; white line: how far back it stays above "
    "1/1000 of the last timestep's"
)
NOTES = (
    "half-life: steps back in which the norm is halved;\n"
    "horizon: until 1/1000 is left (all: more than there are).\n"
    f"Linear RNN: recurrent weight {FACTOR} × orthogonal,\nnot trained."
)


def save_figure(nets: Sequence[Net], textbook: TimeReading, path: Path) -> None:
    """Draw a heat map for each net, its decay curve before and after training, and a table.

    Args:
        nets: The trained nets.
        textbook: Reading of the linear RNN.
        path: Where the PNG goes.
    """
    with plt.rc_context({**STYLE, "font.size": 10, "axes.titlesize": 10.5}):
        layout = ConstrainedLayoutEngine(wspace=0.05)
        figure = plt.figure(figsize=(11.5, 7.8), layout=layout)
        rows = figure.add_gridspec(2, 1, height_ratios=[1, 1.05])
        upper, lower = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
        maps = upper.subplots(1, len(nets), sharex=True, sharey=True)
        meshes = [draw_map(axes, net) for axes, net in zip(maps, nets, strict=True)]
        upper.suptitle(CAPTION, fontsize=10.5, x=0.01, ha="left")
        maps[0].set_ylabel("timestep")
        upper.supxlabel("optimizer step (square-root scale)", fontsize=10)
        bar = upper.colorbar(meshes[0], ax=maps, extend="min", pad=0.015, aspect=22)
        bar.set_label("‖∂L/∂h$_t$‖, nats per unit of state")
        bar.ax.minorticks_off()
        start, end, table = lower.subplots(1, 3, width_ratios=[1, 1, 1.12])
        draw_curves(start, {net.name: net.start for net in nets}, textbook)
        draw_curves(end, {net.name: net.end for net in nets}, textbook)
        start.set_title("Before the first step")
        end.set_title("Mean over the last tenth of training")
        start.set_ylabel("‖∂L/∂h$_t$‖ relative to the last timestep's")
        annotate(start, textbook)
        draw_table(table, nets, textbook)
        figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
        plt.close(figure)


def draw_map(axes: Axes, net: Net) -> QuadMesh:
    """Timestep by training step, and how far back a thousandth of the last norm is exceeded."""
    steps = [reading.step for reading in net.readings]
    gap = steps[-1] - steps[-2] if len(steps) > 1 else 1
    step_edges = [*steps, steps[-1] + gap]
    norms = np.array([reading.profile for reading in net.readings]).T
    time_edges = np.arange(len(norms) + 1) + 0.5  # timesteps are counted from 1
    scale = LogNorm(DARKEST, BRIGHTEST)
    # A norm of 0 has no logarithm; it belongs below the scale, and only NaN stays gray.
    shown = np.where(norms == 0.0, DARKEST / 10, norms)
    mesh = axes.pcolormesh(step_edges, time_edges, shown, norm=scale, cmap="viridis")
    edge = [len(norms) - reached(reading) + 0.5 for reading in net.readings]
    axes.stairs(edge, step_edges, baseline=None, color="white", linewidth=1.3)
    axes.set_facecolor("#bbbbbb")
    axes.set_ylim(0.5, len(norms) + 0.5)
    axes.grid(visible=False)
    axes.set_title(net.name)
    # Most of it happens in the first steps, which a linear axis would show as a sliver.
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set_xlim(step_edges[0], step_edges[-1])
    axes.set_xticks(step_ticks(step_edges[-1]))
    return mesh


def step_ticks(last: int) -> list[int]:
    """Round numbers that lie about evenly on a square-root axis."""
    unit = 10 ** math.floor(math.log10(max(last, 10))) // 10
    return [tick * unit for tick in (0, 1, 5, 10, 20, 40, 60, 80) if tick * unit <= last]


def draw_curves(axes: Axes, readings: Mapping[str, TimeReading], textbook: TimeReading) -> None:
    """Norm relative to that of the last timestep, by the number of steps back from it."""
    for name, reading in {**readings, "linear RNN": textbook}.items():
        # What is off the axis ends the line; a norm of 0 has no place on it at all.
        norms = [norm if norm > 0.0 else math.nan for norm in relative(reading)]
        axes.plot(norms, linewidth=2.0, label=name, **LINES[name])
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, HIGHEST)
    axes.axhline(1 / HORIZON_FACTOR, color=INK, linewidth=0.8)
    last = max(reading.timesteps for reading in readings.values()) - 1
    label: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 9, "color": INK}
    axes.text(last, 1.2 / HORIZON_FACTOR, "1/1000", **label)
    axes.set_xlim(0, last)
    axes.set_xlabel("steps back from the last timestep")


def annotate(axes: Axes, textbook: TimeReading) -> None:
    """What was measured in the linear RNN beside what it has to be."""
    measured = relative(textbook)[LAG]
    axes.plot([LAG], [measured], "o", color=INK, markersize=6)
    axes.annotate(
        f"linear RNN, {LAG} steps back:\nmeasured {measured:.4g}\n{FACTOR}$^{{{LAG}}}$ = "
        f"{FACTOR**LAG:.4g}",
        xy=(LAG, measured),
        xytext=(0.985, 0.985),
        textcoords="axes fraction",
        ha="right",
        va="top",
        fontsize=9.5,
        color=INK,
        arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.8, "relpos": (0.6, 0.0)},
    )


def draw_table(axes: Axes, nets: Sequence[Net], textbook: TimeReading) -> None:
    """Half-life and horizon before and after training; also the legend of the curves."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(8.5, 0)
    axes.set_title("Steps back in time, before → after")
    for x, head in zip(COLUMNS, ("half-life", "horizon", "test\naccuracy"), strict=True):
        axes.text(x, 1.2, head, ha="right", va="bottom")
    axes.plot([0.02, 1.0], [1.4, 1.4], color=INK, linewidth=0.8)
    rows = [
        (
            net.name,
            f"{half_life(net.start)} → {half_life(net.end)}",
            f"{horizon(net.start)} → {horizon(net.end)}",
            f"{net.accuracy:.2f}",
        )
        for net in nets
    ]
    rows.append(("linear RNN", half_life(textbook), horizon(textbook), "–"))
    for y, (name, *cells) in enumerate(rows, start=2):
        axes.plot([0.02, 0.115], [y, y], linewidth=2.0, **LINES[name])
        axes.text(0.135, y, name, va="center")
        for x, cell in zip(COLUMNS, cells, strict=True):
            axes.text(x, y, cell, ha="right", va="center")
    axes.text(0.02, 8.4, NOTES, va="bottom", fontsize=9, color=INK, linespacing=1.35)


def half_life(reading: TimeReading) -> str:
    if math.isnan(reading.decay_rate):
        return "?"
    if reading.decay_rate >= 0.0:
        return "grows"
    return f"{reading.half_life:.1f}" if reading.half_life < 10 else f"{reading.half_life:.0f}"


def horizon(reading: TimeReading) -> str:
    if math.isnan(reading.decay_rate):
        return "?"
    within = reading.decay_rate < 0.0 and reading.horizon < reading.timesteps
    return f"{reading.horizon:.0f}" if within else "all"
