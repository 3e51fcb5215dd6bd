"""The picture: how far the gradient reaches before training, beside what is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # a file is all that is wanted: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from figure_style import AMBER, BLUE, GREEN, INK, ORANGE, PINK, SKY, STYLE
from matplotlib.axes import Axes
from recurrent_remedies_nets import SWAPS, Net

from lightning_gradguard.readings import HORIZON_FACTOR

# A line style besides, for print.
_COLORS = (ORANGE, BLUE, GREEN, PINK, AMBER, SKY)
_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)))
LINES: dict[str, dict[str, Any]] = {
    name: {"color": _COLORS[place % 6], "linestyle": _STYLES[place // 6 % 2], "linewidth": 1.8}
    for place, name in enumerate(SWAPS)
}
LINES["nn.RNN"] = {"color": INK, "linestyle": (0, (1, 1)), "linewidth": 2.6}
MOMENTS = ("before the first step", "at the end of training")
LOWEST, HIGHEST = 1e-9, 1e2  # of the gradient
SMALLEST = 1e-4  # of the loss


def save_figure(nets: Sequence[Net], baseline: float, path: Path) -> None:
    """Draw the gradient over timesteps before training, and the learning curves.

    Args:
        nets: All trainings.
        baseline: Loss of whoever guesses.
        path: Where the PNG goes.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(14, 5.2), sharey=False, layout="constrained")
        for panel, title in zip(axes[:2], MOMENTS, strict=True):
            draw_frame(panel, len(nets[0].start.curve))
            panel.set_title(f"The gradient {title}")
        for net in nets:
            draw_curve(axes[0], net.name, net.start.curve)
            draw_curve(axes[1], net.name, net.end.curve)
            draw_losses(axes[2], net)
        axes[0].set_ylabel("‖∂L/∂h$_t$‖, times that of the last timestep")
        axes[2].axhline(baseline, color=INK, linewidth=0.8)
        axes[2].set_yscale("log")
        axes[2].set_ylim(bottom=SMALLEST)
        axes[2].set_title("What is learned: loss, nats (line: guessing)")
        axes[2].set_xlabel("optimizer step")
        handles, labels = axes[2].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, handlelength=3.2)
        figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
        plt.close(figure)


def draw_frame(axes: Axes, timesteps: int) -> None:
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, HIGHEST)
    axes.set_xlim(0, timesteps - 1)
    axes.set_xlabel("timesteps back from the last one")
    axes.axhline(1 / HORIZON_FACTOR, color=INK, linewidth=0.8)
    axes.text(0.5, 0.8 / HORIZON_FACTOR, "1/1000", va="top", color=INK, size=9)


def draw_curve(axes: Axes, name: str, curve: Sequence[float]) -> None:
    """A norm of 0 has no place on a logarithmic axis."""
    axes.plot([norm if norm > 0.0 else math.nan for norm in curve], **LINES[name])


def draw_losses(axes: Axes, net: Net) -> None:
    """Running geometric mean over a fortieth of the steps: single batches differ."""
    width = max(1, len(net.losses) // 40)
    logs = np.log(np.maximum(net.losses, 1e-12))
    means = np.exp(np.convolve(logs, np.full(width, 1 / width), mode="valid"))
    axes.plot(np.arange(len(means)) + width, means, label=net.name, **LINES[net.name])
