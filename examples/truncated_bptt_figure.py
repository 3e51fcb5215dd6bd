"""The picture of truncated backpropagation: where the gradient ends, and what is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")  # a file is all that is wanted: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from figure_style import BLUE, GREEN, INK, ORANGE, PINK, STYLE
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from truncated_bptt import Run

from lightning_gradguard.readings import HORIZON_FACTOR, TimeReading

COLORS = (ORANGE, BLUE, GREEN, PINK)


def save_figure(runs: Sequence[Run], baseline: float, path: Path) -> None:
    """Draw how far back the gradient reaches within a chunk, and the losses.

    Args:
        runs: One for each length.
        baseline: Loss of whoever remembers nothing.
        path: Where the PNG goes.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
        for run, color in zip(runs, COLORS * len(runs), strict=False):
            draw_reach(axes[0], reach(run.readings), color)
            draw_reach(axes[1], passed_on(run.readings[-1]), color)
            draw_loss(axes[2], run, color)
        for panel in axes[:2]:
            panel.set_xlim(left=0)
            panel.set_xlabel("characters back from the end of the chunk")
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("‖∂L/∂h$_t$‖, times that at the end of the chunk")
        axes[0].set_title("The gradient of all losses ends at the chunk's edge (×)")
        axes[1].set_yscale("log")
        axes[1].set_ylabel("share that is passed on")
        axes[1].axhline(1 / HORIZON_FACTOR, color=INK, linewidth=0.8)
        axes[1].set_title("That of a single loss: faded, or cut off before it has (×)")
        axes[2].axhline(baseline, color=INK, linewidth=0.8, linestyle=":")
        axes[2].set_xlabel("optimizer step")
        axes[2].set_ylabel("nats per character (dotted: how often each comes)")
        axes[2].set_title("What is learned")
        axes[2].legend(title="chunks of")
        figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
        plt.close(figure)


def draw_reach(axes: Axes, curve: Sequence[float], color: str) -> None:
    """Norm by steps back, with a mark at the edge."""
    axes.plot(curve, color=color, linewidth=2.0)
    axes.plot([len(curve) - 1], [curve[-1]], "x", color=color, markersize=10, markeredgewidth=3)
    axes.axvline(len(curve) - 1, color=color, linewidth=0.8, linestyle=(0, (2, 3)))


def reach(readings: Sequence[TimeReading]) -> list[float]:
    """Norm relative to that of the last timestep, by steps back; geometric mean of all readings."""
    profiles = np.array([reading.profile for reading in readings])[:, ::-1]
    with np.errstate(divide="ignore"):
        logs = np.log(profiles / profiles[:, :1]).mean(axis=0)
    return [math.exp(log) for log in logs]


def passed_on(reading: TimeReading) -> list[float]:
    """What is left of the gradient of one loss, by steps back, at the mean rate."""
    return [math.exp(reading.decay_rate * lag) for lag in range(reading.timesteps)]


def draw_loss(axes: Axes, run: Run, color: str) -> None:
    """Running mean, as single chunks differ."""
    width = max(1, len(run.losses) // 20)
    means = np.convolve(run.losses, np.full(width, 1 / width), mode="valid")
    steps = np.arange(len(means)) + width - 1
    axes.plot(steps, means, color=color, linewidth=2.0, label=str(run.chunk))
