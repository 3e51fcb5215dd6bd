"""How the gradient decays through time, as curves. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex

from lightning_gradguard.record._plot_axes import bar_beside, color
from lightning_gradguard.record._plot_data import decay_curve, half_life_in_words
from lightning_gradguard.record.metrics import modules_of_one_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_gradguard.readings import TimeReading

# Beyond so many, neither colors nor a legend tell curves apart.
_MOST_LINES = 6
_DECADES_SHOWN = 12.0
# By the source of a reading: of a module's state, its input or its output.
_LABELS = {
    "exact": "gradient norm ‖∂L/∂h$_t$‖",
    "input": "gradient norm ‖∂L/∂x$_t$‖",
    "output": "gradient norm ‖∂L/∂y$_t$‖",
}


def draw_modules(ax: Axes, readings: Sequence[TimeReading]) -> None:
    """Draw one reading of each module: a line each, or colored in their order if they are many."""
    if len(readings) > _MOST_LINES:
        places = [float(place) for place in range(1, len(readings) + 1)]
        _draw_ramp(ax, readings, places, "module, in the order of the model")
        return
    alone = modules_of_one_part(reading.name for reading in readings)
    for place, reading in enumerate(readings):
        back, norms = decay_curve(reading)
        label = f"{alone.get(reading.name, reading.name)}, {half_life_in_words(reading)}"
        ax.plot(back, norms, color=color(place), label=label, linewidth=1.2)
        _draw_half_life(ax, reading, color(place))


def draw_course(ax: Axes, readings: Sequence[TimeReading]) -> None:
    """Draw readings of one module from early to late, with the half-life of the newest."""
    colors = _draw_ramp(ax, readings, [float(r.step) for r in readings], "optimizer step")
    newest = readings[-1]
    ax.lines[-1].set_label(f"{newest.name}, newest: {half_life_in_words(newest)}")
    _draw_half_life(ax, newest, colors[-1])


def frame_decay(ax: Axes, readings: Sequence[TimeReading]) -> None:
    """Set limits and labels; what has fallen too far to matter leaves the plot."""
    curves = [decay_curve(reading) for reading in readings]
    norms = np.concatenate([norms[np.isfinite(norms)] for _, norms in curves])
    highest = float(norms.max())
    lowest = max(float(norms.min()), highest / 10.0**_DECADES_SHOWN)
    ax.set_yscale("log")
    ax.set_ylim(lowest / 1.5, highest * 2.0)
    ax.set_xlim(0.0, max(1.0, *(float(back[-1]) for back, _ in curves)))
    ax.set_xlabel("steps back from the last timestep")
    sources = {reading.source for reading in readings}
    ax.set_ylabel(_LABELS[sources.pop()] if len(sources) == 1 else "gradient norm per timestep")


def _draw_ramp(
    ax: Axes, readings: Sequence[TimeReading], places: Sequence[float], label: str
) -> list[str]:
    """Curves from dark to bright, by place; returns their colors."""
    ramp = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.0, 0.88, 256)))
    scale = Normalize(places[0], max(places[-1], places[0] + 1.0))
    colors = [to_hex(ramp(scale(place))) for place in places]
    for each, reading in zip(colors, readings, strict=True):
        ax.plot(*decay_curve(reading), color=each, linewidth=1.0)
    bar_beside(ax, ScalarMappable(scale, ramp), label)
    return colors


def _draw_half_life(ax: Axes, reading: TimeReading, color: str) -> None:
    """The line of the measured rate, and where on it a half is left."""
    back, norms = decay_curve(reading)
    rate = reading.decay_rate
    if not np.isfinite(rate):
        return
    first = int(np.flatnonzero(np.isfinite(norms))[0])
    most = _DECADES_SHOWN * np.log(10.0) / max(abs(rate), 1e-12)
    ends = np.array([back[first], min(back[-1], back[first] + most)])
    line: dict[str, Any] = {"color": color, "linewidth": 0.8}
    ax.plot(ends, norms[first] * np.exp(rate * (ends - ends[0])), linestyle=(0, (4, 2)), **line)
    half = back[first] + reading.half_life
    if half <= back[-1]:
        left = norms[first] * (0.5 if rate < 0.0 else 2.0)
        ax.plot([half], [left], marker="o", markersize=4.0, markerfacecolor="white", **line)
