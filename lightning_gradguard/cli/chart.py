"""Numbers as columns of block characters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_NOT_FINITE = "×"


@dataclass(frozen=True)
class Chart:
    """Columns, ready to be printed.

    Attributes:
        lines: From the top one down, all of the same length.
        low: The smallest number; NaN if there is nothing to draw.
        high: The largest, for which the highest column stands.
    """

    lines: tuple[str, ...]
    low: float = math.nan
    high: float = math.nan


def columns_of(rows: int, width: int) -> list[slice]:
    """Which rows share a column, where there are more of them than columns.

    Example:
        >>> columns_of(5, 2), columns_of(1, 80)
        ([slice(0, 2, None), slice(2, 5, None)], [slice(0, 1, None)])
    """
    columns = min(rows, width)
    edges = [rows * column // max(columns, 1) for column in range(columns + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


def draw(values: Floats, width: int, height: int, *, log: bool = False) -> Chart:
    """Draw numbers as columns; of those that share one, the largest counts.

    Args:
        values: In order; NaN where there is none. Where there is but an infinity, a cross stands.
        width: Columns, at most.
        height: Lines.
        log: Draw the logarithm, of positive numbers.

    Example:
        >>> print(*draw(np.array([0.0, 1.0, 2.0, np.inf]), 80, 1).lines)
        ▁▄█×
        >>> print(*draw(np.array([1e-3, 1.0, 1e3]), 80, 2, log=True).lines, sep="|")
          █|▁██
    """
    values = np.where((values > 0.0) | (not log), values, np.nan)
    tops = np.array([_top(values[column]) for column in columns_of(len(values), width)])
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Chart(_lines(np.where(np.isnan(tops), 0.0, np.inf), height))
    low, high = float(finite.min()), float(finite.max())
    # Numbers may lie a whole range of float apart: no difference of theirs may overflow.
    unit = max(abs(low), abs(high), 1e-300)
    at, bottom, top = (np.log(v) if log else np.asarray(v) / unit for v in (tops, low, high))
    share = (at - bottom) / (top - bottom) if top > bottom else at - bottom + 0.5
    levels = np.where(np.isnan(tops), 0.0, 1.0 + share * (8 * height - 1))
    return Chart(_lines(levels, height), low, high)


def _top(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    if finite.size:
        return float(finite.max())
    return math.inf if np.isinf(values).any() else math.nan


def _lines(levels: Floats, height: int) -> tuple[str, ...]:
    """Columns of so many eighths of a line; an infinite one is a cross on the ground."""
    return tuple(
        "".join(_cell(level, ground) for level in levels.tolist())
        for ground in range(8 * (height - 1), -1, -8)
    )


def _cell(level: float, ground: int) -> str:
    if math.isinf(level):
        return " " if ground else _NOT_FINITE
    return _EIGHTHS[min(max(round(level) - ground, 0), 8)]
