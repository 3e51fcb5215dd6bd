"""What all plots share: their style, their figures, heat maps. Needs matplotlib."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterMathtext,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

from lightning_gradguard.record._plot_data import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar

_SET: Any = mpl.rcParams  # typed by the names of all parameters, which none of ours has
_DEFAULTS: Any = mpl.rcParamsDefault
# Okabe and Ito's palette, which stays apart for every kind of color vision.
_PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
NORM, FINDING, LIMIT, LOSS = range(4)
# For a column of a paper. What the user has set to something of their own stays.
_STYLE: dict[str, Any] = {
    "font.size": 8.0,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=_PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "legend.fontsize": "small",
    "legend.frameon": False,
    "xtick.labelsize": "small",
    "xtick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.labelsize": "small",
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
}


# -- figures --------------------------------------------------------------------------------------


@contextlib.contextmanager
def axes_to_draw_in(
    ax: Axes | None, size: tuple[float, float], *, layout: Literal["constrained"] | None
) -> Iterator[Axes]:
    """The user's axes, or those of a new figure, which no pyplot knows and so none keeps.

    Args:
        ax: The user's; ``None`` for new ones.
        size: Width and height of a new figure in inches.
        layout: How a new figure makes room for what is around its axes; ``None`` for not at all,
            which is much faster.
    """
    style = _STYLE if ax is None else {"axes.prop_cycle": cycler(color=_PALETTE)}
    changed: Any = {k: v for k, v in style.items() if _SET[k] == _DEFAULTS[k]}
    with mpl.rc_context(changed):
        if ax is not None:
            yield ax
            return
        figure = Figure(figsize=size, layout=layout)
        yield figure.add_subplot()
        for axes in figure.axes:
            _settle_ticks(axes)


def _settle_ticks(ax: Axes) -> None:
    """Ticks are made when a figure is drawn, which is when the style is no longer in force."""
    for name, axis in (("xtick", ax.xaxis), ("ytick", ax.yaxis)):
        size = FontProperties(size=_SET[f"{name}.labelsize"]).get_size_in_points()
        axis.set_tick_params(which="both", labelsize=size)
        for which in ("major", "minor"):
            axis.set_tick_params(which=which, width=_SET[f"{name}.{which}.width"])


def color(place: int) -> str:
    """A color of the cycle in force: lines look up ``"C0"`` only when they are drawn."""
    return to_hex(f"C{place}")


def label_steps(ax: Axes) -> None:
    """Whole numbers along the optimizer's steps."""
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def legend_above(ax: Axes, width: float | None) -> None:
    """A legend above the axes if the figure is ours, else wherever there is room.

    Args:
        ax: Axes whose artists have labels.
        width: That of our figure in inches; ``None`` if it is the user's, whose title may be there.
    """
    handles, labels = ax.get_legend_handles_labels()
    if not handles:
        return
    if width is None:
        ax.legend(handles, labels)
        return
    size = FontProperties(size=_SET["legend.fontsize"]).get_size_in_points()
    entry = (0.5 * max(len(label) for label in labels) + 3.3) * size / 72.0
    columns = int(max(1.0, 0.8 * width / entry))
    ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
        borderpad=0.0,
        columnspacing=1.2,
        handlelength=1.6,
        handletextpad=0.5,
        labelspacing=0.3,
        ncols=min(columns, 3),
    )


# -- heat maps ------------------------------------------------------------------------------------


def draw_heat_map(
    ax: Axes, grid: Grid, label: str, *, rows: tuple[float, float], plain: bool = False
) -> None:
    """Draw a matrix of positive numbers by step, with a logarithmic color bar.

    Args:
        ax: Where to.
        grid: The matrix.
        label: What the colors mean.
        rows: Coordinates of its first and last edge on the vertical axis.
        plain: Whether powers of ten are written ``1e-3``, as the others take long to typeset.
    """
    cmap = mpl.colormaps[mpl.rcParams["image.cmap"]].with_extremes(bad="0.75")
    image = ax.imshow(
        np.ma.masked_invalid(10.0**grid.logs),
        aspect="auto",
        cmap=cmap,
        extent=(grid.steps[0], grid.steps[1], rows[1], rows[0]),
        interpolation="nearest",
        norm=LogNorm(10.0**grid.lowest, 10.0**grid.highest),
        origin="upper",
    )
    ax.spines[:].set_visible(False)
    label_steps(ax)
    bar = bar_beside(ax, image, label, extend=grid.beyond)
    _tick_colors(bar.ax.yaxis, grid.highest - grid.lowest, plain=plain)


def bar_beside(ax: Axes, colors: ScalarMappable, label: str, **options: Any) -> Colorbar:
    """A color bar at the right of the axes."""
    bar = ax.figure.colorbar(colors, ax=ax, aspect=24, pad=0.02, **options)
    bar.set_label(label)
    bar.ax.spines[:].set_visible(False)
    return bar


def _tick_colors(axis: Axis, decades: float, *, plain: bool) -> None:
    """A handful of round numbers, however few decades there are."""
    axis.set_minor_locator(NullLocator())
    if decades >= 2.0:
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_major_formatter(FuncFormatter(_power_of_ten) if plain else LogFormatterMathtext())
        return
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if decades > 1.0 else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(_as_short_as_can_be))


def _power_of_ten(value: float, _: float) -> str:
    return f"1e{round(math.log10(value))}"


def _as_short_as_can_be(value: float, _: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def name_rows(ax: Axes, names: Sequence[str], height: float) -> None:
    """Name as many rows as have room, from the first on at equal distances.

    Args:
        ax: Axes whose rows are counted from 0.
        names: One for each row.
        height: Inches that there are for them.
    """
    size = FontProperties(size=mpl.rcParams["ytick.labelsize"]).get_size_in_points()
    room = max(1, int(height * 72.0 / (1.3 * size)))
    rows = range(0, len(names), -(-len(names) // room))
    ax.set_yticks(list(rows), [names[row] for row in rows])
    ax.tick_params(axis="y", length=2.0)
