"""Heat maps of a run as small pictures for its loggers, and when it is time to draw them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_gradguard._validation import check_number
from lightning_gradguard.record._plot_data import Grid, curves_by_step, grid, short_names
from lightning_gradguard.record.metrics import metric_key, modules_of_one_part
from lightning_gradguard.record.run_history import OptimizerHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Picture = npt.NDArray[np.uint8]

_WIDTH, _HEIGHT, _DOTS_PER_INCH = 6.4, 3.6, 100  # inches
_COLUMNS, _ROWS = 400, 200
_LEFT_OF_NAMES, _LEFT_OF_NUMBERS = 0.24, 0.1  # of the picture's width
_BOTTOM, _TOP, _RIGHT = 0.12, 0.97, 0.99
_NAMED = 0.5  # as if it were half as high: to draw a name takes some milliseconds
# Modules that are drawn through time: a page of pictures that all look alike helps nobody.
MOST_MODULES = 4


def heat_maps(history: OptimizerHistory, *, most_modules: int = MOST_MODULES) -> dict[str, Picture]:
    """Draw the gradient norm of each layer by step, and of each timestep by step.

    Args:
        history: What happened to the parameters of one optimizer.
        most_modules: How many modules are drawn through time, the first ones. Default 4.

    Returns:
        RGB pictures of shape ``(360, 640, 3)`` by metric key: ``grad_norm/heat_map`` and, for each
        module, ``grad_time/<module>/heat_map``, with the optimizer's label in second place where it
        has one. What there is nothing to draw of is left out.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``most_modules`` is not an integer.
        ValueError: If ``most_modules`` is negative.

    Example:
        >>> from lightning_gradguard.record.run_history import LayerMatrix
        >>> norms = LayerMatrix(("net.0", "net.2"), np.arange(3.0), np.full((3, 2), 0.1))
        >>> pictures = heat_maps(OptimizerHistory(layers=norms))
        >>> {key: picture.shape for key, picture in pictures.items()}
        {'grad_norm/heat_map': (360, 640, 3)}
    """
    check_number("most_modules", most_modules, at_least=0, integer=True)
    pictures: dict[str, Picture] = {}
    layers = history.layers
    if layers.names:
        drawn = grid(layers.steps, layers.values, columns=_COLUMNS, rows=_ROWS)
        if drawn is not None:
            key = metric_key("grad_norm", history.label, "heat_map")
            pictures[key] = _layers_picture(drawn, layers.names)
    latest = history.latest_times
    alone = modules_of_one_part(reading.name for reading in latest)
    for reading in latest[:most_modules]:
        times = [r for r in history.times if r.name == reading.name and r.profile]
        picture = _timesteps_picture(history, reading.name) if times else None
        if picture is not None:
            name = alone.get(reading.name, reading.name)
            pictures[metric_key("grad_time", history.label, name, "heat_map")] = picture
    return pictures


class DrawingBudget:
    """Says when it is time to draw again, so that drawing takes at most a share of the run.

    After each drawing it waits until the time that this took is no more than ``share`` of the time
    since; and at least ``every_seconds``, or ``spacing`` times the age of the run if that is more,
    so that also a run of days leaves some hundred pictures. Whether a model is small or large, a
    step fast or slow, does not matter.

    Args:
        share: The largest share of the time. Default 0.005: half of what logging may cost.
        every_seconds: The least time between two drawings, and before the first. Default 60.
        spacing: The least time between two, as a share of the age of the run. Default 0.05.
        clock: Seconds, from any start.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.

    Example:
        >>> clock = iter([0.0, 59.0, 60.0, 60.0, 60.5, 120.0, 160.5]).__next__
        >>> budget = DrawingBudget(clock=clock)
        >>> budget.due(), budget.due()  # after 59 s, after 60 s
        (False, True)
        >>> with budget.drawing():  # takes 0.5 s, which is half a percent of 100 s
        ...     pass
        >>> budget.due(), budget.due()  # after 120 s, after 160.5 s
        (False, True)
    """

    def __init__(
        self,
        share: float = 0.005,
        *,
        every_seconds: float = 60.0,
        spacing: float = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_number("share", share, above=0.0, at_most=1.0)
        check_number("every_seconds", every_seconds, at_least=0.0)
        check_number("spacing", spacing, at_least=0.0)
        self.share = share
        self.every_seconds = every_seconds
        self.spacing = spacing
        self._clock = clock
        self._start = clock()
        self._next = self._start + every_seconds

    def due(self) -> bool:
        """Whether it is time to draw."""
        return self._clock() >= self._next

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw inside of it, and the time that this takes counts, also if it fails."""
        begin = self._clock()
        try:
            yield
        finally:
            end = self._clock()
            wait = max(
                (end - begin) / self.share,
                self.every_seconds,
                self.spacing * (end - self._start),
            )
            self._next = end + wait


def _layers_picture(drawn: Grid, names: tuple[str, ...]) -> Picture:
    from lightning_gradguard.record import _plot_axes as style

    def draw(ax: Axes) -> None:
        rows = len(drawn.logs)
        style.draw_heat_map(ax, drawn, "gradient norm", rows=(-0.5, rows - 0.5), plain=True)
        style.name_rows(ax, short_names(names)[:: drawn.rows_each], _HEIGHT * _NAMED)

    return _picture(draw, _LEFT_OF_NAMES)


def _timesteps_picture(history: OptimizerHistory, name: str) -> Picture | None:
    from lightning_gradguard.record import _plot_axes as style

    readings = [r for r in history.times if r.name == name and r.profile]
    steps, norms, longest = curves_by_step(readings)
    drawn = grid(steps, norms, columns=_COLUMNS, rows=_ROWS)
    if drawn is None:
        return None

    def draw(ax: Axes) -> None:
        style.draw_heat_map(ax, drawn, "gradient norm", rows=(-0.5, longest - 0.5), plain=True)
        ax.set_ylim(-0.5, longest - 0.5)  # the last timestep at the bottom
        ax.set_ylabel(f"{name}: steps back in time")

    return _picture(draw, _LEFT_OF_NUMBERS)


def _picture(draw: Callable[[Axes], None], left: float) -> Picture:
    """What is drawn, as an RGB picture; no window, and nothing of it is kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from lightning_gradguard.record import _plot_axes as style

    with style.axes_to_draw_in(None, (_WIDTH, _HEIGHT), layout=None) as ax:
        ax.figure.subplots_adjust(left, _BOTTOM, _RIGHT, _TOP)
        draw(ax)
    figure: Any = ax.figure
    figure.set_dpi(_DOTS_PER_INCH)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
