"""What is drawn of a run, as arrays: the numbers behind every plot and picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from lightning_gradguard._validation import check_choice, check_type
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.run_history import Floats, OptimizerHistory, RunHistory

# Colors tell some nine decades apart; a range that is set by one spike shows nothing else.
_MOST_DECADES = 9.0
_LEAST_DECADES = 0.3
# Percent of the values that are taken for usual; the colors reach a decade beyond them.
_USUAL = (0.5, 99.5)


def part_of(run: RunHistory | OptimizerHistory, optimizer: str | None = None) -> OptimizerHistory:
    """The part of a run that is drawn: that of the named optimizer, or the first.

    Raises:
        TypeError: If ``run`` is neither a run nor the part of one optimizer.
        ValueError: If it has no optimizer, or none of that name.
    """
    check_type("run", run, (RunHistory, OptimizerHistory), "a RunHistory or an OptimizerHistory")
    parts = run.optimizers if isinstance(run, RunHistory) else (run,)
    if not parts:
        raise ValueError("run must have a step to draw, got one in which no optimizer has stepped")
    if optimizer is None:
        return parts[0]
    check_choice("optimizer", optimizer, [part.label for part in parts])
    return next(part for part in parts if part.label == optimizer)


# -- along the steps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A number along the steps, in bins if there are more steps than can be told apart.

    Attributes:
        steps: First step of each bin.
        low: Least value in it; NaN where none is known.
        middle: Its mean.
        high: The greatest.
    """

    steps: Floats
    low: Floats
    middle: Floats
    high: Floats

    @property
    def binned(self) -> bool:
        """Whether a bin has more than one value."""
        return self.middle is not self.low


def series(steps: Floats, values: Floats, most: int = 400, *, log: bool = False) -> Series:
    """Reduce a column to at most ``2 * most`` values that are known, or to ``most`` bins.

    Args:
        steps: Shape ``(S,)``.
        values: Shape ``(S,)``; what is not finite, and for ``log`` not positive, is not known.
        most: How many bins can be told apart.
        log: Whether the mean is the geometric one.
    """
    known = np.isfinite(values) & ((values > 0.0) | (not log))
    shown = np.where(known, values, np.nan)
    if len(steps) <= 2 * most:
        return Series(steps, shown, shown, shown)
    starts = np.linspace(0, len(steps), most, endpoint=False).astype(np.intp)
    scaled = np.log(np.where(known, values, 1.0)) if log else np.where(known, values, 0.0)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    means = np.add.reduceat(np.where(known, scaled, 0.0), starts) / np.where(
        counts > 0, counts, np.nan
    )
    return Series(
        steps[starts],
        np.fmin.reduceat(shown, starts),
        np.exp(means) if log else means,
        np.fmax.reduceat(shown, starts),
    )


def thinned(steps: Iterable[float], span: float, most: int = 150) -> list[float]:
    """Of marks that would cover one another, the first."""
    kept: dict[int, float] = {}
    for step in steps:
        kept.setdefault(int(step / max(span, 1.0) * most), step)
    return list(kept.values())


# -- heat maps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A matrix of positive numbers as it is drawn: rows by equal intervals of steps.

    Attributes:
        logs: Their decimal logarithms, shape ``(rows, columns)``; NaN where there is no finite
            value, and one decade below all others where the value is 0.
        steps: Where the first column begins and the last one ends.
        rows_each: Rows of the matrix in one of these.
        lowest: Logarithm at the lower end of the colors.
        highest: That at the upper end.
    """

    logs: Floats
    steps: tuple[float, float]
    rows_each: int
    lowest: float
    highest: float

    @property
    def beyond(self) -> str:
        """At which ends of the colors there are values beyond: as matplotlib's ``extend``."""
        below = bool(np.nanmin(self.logs) < self.lowest)
        above = bool(np.nanmax(self.logs) > self.highest)
        return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def grid(steps: Floats, values: Floats, *, columns: int, rows: int) -> Grid | None:
    """Bring a matrix to a size that can be drawn; bins hold the geometric mean.

    Args:
        steps: Shape ``(S,)``, ascending, at any distances: a value holds until the next.
        values: Shape ``(S, L)``.
        columns: The most columns.
        rows: The most rows.

    Returns:
        ``None`` if there is no finite positive value.
    """
    positive = np.isfinite(values) & (values > 0.0)
    if not positive.any():
        return None
    logs = np.log10(np.where(positive, values, 1.0))
    least = logs[positive].min()
    logs = np.where(positive, logs, np.where(values == 0.0, least - 1.0, np.nan))
    each = -(-values.shape[1] // rows)
    pooled = _means(logs, np.arange(0, values.shape[1], each), axis=1)
    place, width, count = _columns(steps, columns)
    known, starts = np.unique(place, return_index=True)
    means = _means(pooled, starts, axis=0)
    holds = np.searchsorted(known, np.arange(count), side="right") - 1
    drawn = means[holds].T
    lowest, highest = _limits(drawn[np.isfinite(drawn) & (drawn >= least)], drawn)
    return Grid(drawn, (steps[0], steps[0] + width * count), each, lowest, highest)


def _columns(steps: Floats, most: int) -> tuple[Floats, float, int]:
    """Column of each step, the width of one in steps, and how many there are."""
    if len(steps) < 2:
        return np.zeros(len(steps)), 1.0, 1
    span, gap = float(steps[-1] - steps[0]), float(np.diff(steps).min())
    # As wide as the least distance, so that each step has a column to itself, if there is room.
    count = min(most, int(span / gap + 1e-6) + 1)
    width = gap if count < most else (span + gap) / count
    # A hair more, so that a step on an edge is not left of it for the sake of rounding.
    return np.minimum(np.floor((steps - steps[0]) / width + 1e-6), count - 1), width, count


def _means(logs: Floats, starts: Sequence[int] | np.typing.NDArray[np.intp], axis: int) -> Floats:
    """Mean of the values that are known, from each start to the next."""
    known = np.isfinite(logs)
    counts = np.add.reduceat(known.astype(np.float64), starts, axis=axis)
    totals = np.add.reduceat(np.where(known, logs, 0.0), starts, axis=axis)
    means: Floats = totals / np.where(counts > 0, counts, np.nan)
    return means


def _limits(usual: Floats, drawn: Floats) -> tuple[float, float]:
    """Ends of the colors, so that neither a spike nor what has vanished takes all of them."""
    if not usual.size:
        usual = drawn[np.isfinite(drawn)]
    low, high = np.percentile(usual, _USUAL)
    highest = min(float(usual.max()), float(high) + 1.0)
    lowest = max(float(usual.min()), float(low) - 1.0, highest - _MOST_DECADES)
    lack = _LEAST_DECADES - (highest - lowest)
    return (lowest - lack / 2, highest + lack / 2) if lack > 0 else (lowest, highest)


# -- names ----------------------------------------------------------------------------------------


def short_names(names: Sequence[str], most: int = 26) -> list[str]:
    """Names without the path that all share, and with an ellipsis if still long.

    Example:
        >>> short_names(["model.encoder.rnn", "model.head"])
        ['encoder.rnn', 'head']
        >>> short_names(["model.blocks.0.linear", "model.blocks.1.linear"])
        ['blocks.0.linear', 'blocks.1.linear']
    """
    paths = [name.split(".") for name in names]
    heads = [path[:-1] for path in paths]
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*heads, strict=False))
    shared = len(list(alike)) if len(names) > 1 else 0
    if shared and any(path[shared].isdecimal() for path in paths):
        shared -= 1  # a number by itself is no name
    return [_shortened(".".join(path[shared:]), most) for path in paths]


def _shortened(name: str, most: int) -> str:
    if len(name) <= most:
        return name
    return f"{name[: (most - 1) // 3]}…{name[len(name) - (most - 1 - (most - 1) // 3) :]}"


# -- through time ---------------------------------------------------------------------------------


def decay_curve(reading: TimeReading) -> tuple[Floats, Floats]:
    """Steps back from where the module ends its run, ascending, and the norm at each.

    The norm is NaN where it is not finite or 0, which has no place on a logarithmic axis.
    """
    norms = np.asarray(reading.profile, dtype=np.float64)
    bins = len(norms)
    timesteps = reading.timesteps or bins
    back = (np.arange(bins) + 0.5) * timesteps / max(bins, 1) - 0.5
    if not reading.part.endswith("_reverse"):  # which ends at the first timestep
        norms = norms[::-1]
    return back, np.where(np.isfinite(norms) & (norms > 0.0), norms, np.nan)


def curves_by_step(readings: Sequence[TimeReading], bins: int = 128) -> tuple[Floats, Floats, int]:
    """Readings of one module as a matrix: their steps, norms by steps back, and how many these are.

    Sequences of different lengths are laid upon one another at the end.
    """
    longest = max(reading.timesteps or len(reading.profile) for reading in readings)
    count = min(longest, bins)
    centers = (np.arange(count) + 0.5) * longest / count - 0.5
    rows = np.full((len(readings), count), np.nan)
    for row, reading in zip(rows, readings, strict=True):
        norms = np.asarray(reading.profile, dtype=np.float64)
        if not reading.part.endswith("_reverse"):
            norms = norms[::-1]
        timesteps = reading.timesteps or len(norms)
        place = np.floor((centers + 0.5) * len(norms) / timesteps).astype(np.intp)
        within = place < len(norms)
        row[within] = norms[place[within]]
    return np.array([float(reading.step) for reading in readings]), rows, longest


def half_life_in_words(reading: TimeReading) -> str:
    """The half-life with its unit, or what is the case instead.

    Example:
        >>> half_life_in_words(TimeReading("rnn", "l0", "exact", decay_rate=-0.43))
        'half-life 1.6 steps'
    """
    if math.isnan(reading.decay_rate):
        return "decay not known"
    if math.isinf(reading.half_life):
        return "no decay"
    name = "half-life" if reading.decay_rate < 0.0 else "doubles in"
    steps = reading.half_life
    return f"{name} {steps:.2g} steps" if steps < 100 else f"{name} {steps:.0f} steps"
