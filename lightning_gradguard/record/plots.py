"""Figures of a run for papers: norms by step, layers by step, the gradient through time.

Each function takes what :func:`~lightning_gradguard.record.run_reader.read_run` returns, draws in
the axes that it is given or in a figure of its own, and returns ``(fig, ax)``. A figure of its own
has the width of a column and is not known to pyplot: ``fig.savefig("norms.pdf")`` writes it, and it
is gone with its last reference. Sizes and colors that you have set in matplotlib's ``rcParams``
stay as they are. Needs matplotlib, ``pip install lightning-gradguard[report]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from lightning_gradguard._validation import check_choice, check_number
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record._plot_data import (
    Grid,
    decay_curve,
    grid,
    part_of,
    series,
    short_names,
)
from lightning_gradguard.record.run_history import Floats, OptimizerHistory, RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_COLUMN = 3.4  # inches, as wide as a column of the usual two-column papers
_TALLEST = 5.0
_LABELS = {
    "grad_norm": "gradient norm ‖∂L/∂W‖",
    "update_ratio": "relative update ‖ΔW‖/‖W‖",
}


def plot_norms(
    run: RunHistory | OptimizerHistory,
    ax: Axes | None = None,
    *,
    loss: bool = False,
    optimizer: str | None = None,
    figsize: tuple[float, float] | None = None,
) -> tuple[Figure | SubFigure, Axes]:
    """Draw the gradient norm before clipping, the clip threshold, and what was found and done.

    Of more than 800 steps, the line is the geometric mean of a bin and the shade around it reaches
    from its least to its greatest norm. A finding's line in the upper band lasts as long as it was
    open.

    Args:
        run: A run, or the part of one optimizer.
        ax: Axes to draw in. Default: those of a new figure.
        loss: Whether to draw the loss as well, on an axis of its own at the right.
        optimizer: Label of the optimizer. Default: the first.
        figsize: Width and height of a new figure in inches. Default: 3.4 by 2.5.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``run`` is neither a run nor the part of one optimizer.
        ValueError: If no step was taken, or there is no optimizer of that name.

    Example:
        >>> from lightning_gradguard.record.run_history import STEP_COLUMNS
        >>> columns = dict.fromkeys(STEP_COLUMNS, np.array([1.0, 2.0, 3.0]))
        >>> fig, ax = plot_norms(OptimizerHistory(steps=columns))
        >>> ax.get_xlabel(), ax.get_yscale()
        ('optimizer step', 'log')
    """
    part = part_of(run, optimizer)
    steps = part.steps["step"]
    if not len(steps):
        raise ValueError("run must have a step to draw, got one without any")
    from lightning_gradguard.record import _plot_axes as style
    from lightning_gradguard.record._plot_events import mark_events

    with style.axes_to_draw_in(ax, figsize or (_COLUMN, 2.5), layout="constrained") as axes:
        norms = part.steps["total_norm"]
        _draw_series(axes, steps, norms, style.color(style.NORM), "gradient norm", log=True)
        limit = part.steps["clip_threshold"]
        if np.isfinite(limit).any():
            shown = series(steps, limit, log=True)
            line = axes.plot(shown.steps, shown.middle, label="clip threshold", linewidth=1.0)
            line[0].set(color=style.color(style.LIMIT), linestyle=(0, (4, 1.5)))
        axes.set_yscale("log")
        axes.set_ylabel(_LABELS["grad_norm"])
        style.label_steps(axes)
        axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1.0))
        mark_events(axes, part, steps[~np.isfinite(norms)].tolist())
        if loss:
            _draw_loss(axes, part)
        style.legend_above(axes, None if ax else (figsize or (_COLUMN,))[0])
    return axes.figure, axes


def plot_layers(
    run: RunHistory | OptimizerHistory,
    ax: Axes | None = None,
    *,
    what: Literal["grad_norm", "update_ratio"] = "grad_norm",
    optimizer: str | None = None,
    figsize: tuple[float, float] | None = None,
) -> tuple[Figure | SubFigure, Axes]:
    """Draw a number of each layer by step as a heat map, the first layer of the model on top.

    Values are drawn at equal intervals of steps: where there are more than columns, their geometric
    mean; where there are fewer, each until the next. What has no finite value is gray. Names are
    given as far as there is room, without what they have in common.

    Args:
        run: A run, or the part of one optimizer.
        ax: Axes to draw in. Default: those of a new figure.
        what: ``"grad_norm"`` or ``"update_ratio"``.
        optimizer: Label of the optimizer. Default: the first.
        figsize: Width and height of a new figure in inches. Default: 3.4 by 2 to 5, by layers.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``run`` is neither a run nor the part of one optimizer.
        ValueError: If nothing is known of any layer, or an argument is none of its values.

    Example:
        >>> from lightning_gradguard.record.run_history import LayerMatrix
        >>> norms = LayerMatrix(("net.0", "net.2"), np.arange(3.0), np.full((3, 2), 0.1))
        >>> fig, ax = plot_layers(OptimizerHistory(layers=norms))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['net.0', 'net.2']
    """
    check_choice("what", what, ("grad_norm", "update_ratio"))
    part = part_of(run, optimizer)
    matrix = part.layers if what == "grad_norm" else part.updates
    drawn = grid(matrix.steps, matrix.values, columns=1000, rows=1000) if matrix.names else None
    if drawn is None:
        raise ValueError(f"run must have the {what} of a layer to draw, got none")
    from lightning_gradguard.record import _plot_axes as style

    height = min(max(2.0, 1.1 + 0.14 * len(matrix.names)), _TALLEST)
    with style.axes_to_draw_in(ax, figsize or (_COLUMN, height), layout="constrained") as axes:
        _draw_layers(axes, drawn, matrix.names, _LABELS[what])
    return axes.figure, axes


def plot_timesteps(
    run: RunHistory | OptimizerHistory,
    module: str | None = None,
    ax: Axes | None = None,
    *,
    readings: int = 1,
    optimizer: str | None = None,
    figsize: tuple[float, float] | None = None,
) -> tuple[Figure | SubFigure, Axes]:
    """Draw how the gradient decays through time: its norm by steps back from the last timestep.

    The dashed line shrinks at the measured rate from where the curve begins; the dot on it is the
    half-life, where a half is left. Curves leave the plot where they have fallen by 10¹².

    Args:
        run: A run, or the part of one optimizer.
        module: Path of the module, or with its layer and direction, ``"encoder.rnn/l0"``. Default:
            all that were measured.
        ax: Axes to draw in. Default: those of a new figure.
        readings: How many readings are drawn of one module, evenly over the run and colored by
            step. Default 1: the newest of each.
        optimizer: Label of the optimizer. Default: the first.
        figsize: Width and height of a new figure in inches. Default: 3.4 by 2.4.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``run`` is neither a run nor the part of one optimizer, or ``readings`` no
            integer.
        ValueError: If nothing was measured through time there, or of several readings not all are
            of one module, layer and direction.

    Example:
        >>> norms = tuple(0.5 ** (0.5 * back) for back in reversed(range(20)))
        >>> reading = TimeReading("rnn", "l0", "exact", timesteps=20, decay_rate=-0.3466,
        ...                       profile=norms)
        >>> fig, ax = plot_timesteps(OptimizerHistory(times=(reading,)))
        >>> ax.lines[0].get_label()
        'rnn, half-life 2 steps'
    """
    check_number("readings", readings, at_least=1, integer=True)
    part = part_of(run, optimizer)
    newest = readings == 1
    chosen = _chosen(part.latest_times if newest else part.times, module)
    if not newest:
        chosen = _spread(chosen, readings)
    from lightning_gradguard.record import _plot_axes as style
    from lightning_gradguard.record import _plot_decay as decay

    with style.axes_to_draw_in(ax, figsize or (_COLUMN, 2.4), layout="constrained") as axes:
        draw = decay.draw_modules if newest else decay.draw_course
        draw(axes, chosen)
        decay.frame_decay(axes, chosen)
        style.legend_above(axes, None if ax else (figsize or (_COLUMN,))[0])
    return axes.figure, axes


# -- norms ----------------------------------------------------------------------------------------


def _draw_series(
    ax: Axes, steps: Floats, values: Floats, color: str, label: str, *, log: bool
) -> None:
    shown = series(steps, values, log=log)
    if shown.binned:
        shade = ax.fill_between(shown.steps, shown.low, shown.high)
        shade.set(facecolor=color, alpha=0.25, linewidth=0.0)
    ax.plot(shown.steps, shown.middle, color=color, linewidth=1.0, label=label)


def _draw_loss(ax: Axes, part: OptimizerHistory) -> None:
    """The loss behind the norms, on a linear axis at the right."""
    from lightning_gradguard.record import _plot_axes as style

    color, right = style.color(style.LOSS), ax.twinx()
    _draw_series(right, part.steps["step"], part.steps["loss"], color, "loss", log=False)
    right.set_ylabel("loss", color=color)
    right.tick_params(axis="y", colors=color)
    right.spines["right"].set(visible=True, color=color)
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)


# -- layers ---------------------------------------------------------------------------------------


def _draw_layers(ax: Axes, drawn: Grid, names: Sequence[str], label: str) -> None:
    from lightning_gradguard.record import _plot_axes as style

    rows = len(drawn.logs)
    style.draw_heat_map(ax, drawn, label, rows=(-0.5, rows - 0.5))
    figure = ax.get_figure()
    height = 0.0 if figure is None else figure.bbox.height / figure.dpi * ax.get_position().height
    style.name_rows(ax, short_names(names)[:: drawn.rows_each], height)


# -- timesteps ------------------------------------------------------------------------------------


def _chosen(readings: Sequence[TimeReading], module: str | None) -> list[TimeReading]:
    known = [r for r in readings if np.isfinite(decay_curve(r)[1]).any()]
    if not known:
        raise ValueError("run must have a module that was measured through time, got one without")
    if module is None:
        return known
    chosen = [reading for reading in known if module in (reading.module, reading.name)]
    if not chosen:
        check_choice("module", module, list(dict.fromkeys(reading.name for reading in known)))
    return chosen


def _spread(readings: Sequence[TimeReading], count: int) -> list[TimeReading]:
    """So many of them, evenly from the first to the last."""
    names = list(dict.fromkeys(reading.name for reading in readings))
    if len(names) > 1:
        raise ValueError(
            f"module must name one of {', '.join(map(repr, names))} if several readings of it are "
            "to be drawn"
        )
    places = np.unique(np.linspace(0, len(readings) - 1, count).round().astype(int))
    return [readings[place] for place in places]
