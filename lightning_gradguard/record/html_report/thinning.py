"""What is drawn of many values, so that a page stays small and no peak is lost."""

from __future__ import annotations

import numpy as np

from lightning_gradguard.record.run_history import Floats, LayerMatrix

# Twice the pixels that a chart is wide, so that thinning cannot be seen.
MAX_BUCKETS = 1_500
MAX_COLUMNS = 400
MAX_ROWS = 1_000


def thin_line(steps: Floats, values: Floats, buckets: int = MAX_BUCKETS) -> tuple[Floats, Floats]:
    """The lowest and the highest value of each bucket of steps, at the steps where they were.

    Args:
        steps: Ascending.
        values: One for each step. A value that is not finite becomes NaN, a gap in the line.
        buckets: A line of at most twice as many points is kept as it is.

    Example:
        >>> steps, values = np.arange(1000.0), np.zeros(1000)
        >>> values[123] = 9.0
        >>> shown = thin_line(steps, values, buckets=10)
        >>> len(shown[0]), shown[0][shown[1].argmax()].item()
        (11, 123.0)
    """
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) <= 2 * buckets:
        return steps, values
    table = _in_buckets(values, buckets)
    firsts = np.arange(len(table)) * table.shape[1]
    lowest = firsts + np.where(np.isnan(table), np.inf, table).argmin(axis=1)
    highest = firsts + np.where(np.isnan(table), -np.inf, table).argmax(axis=1)
    kept = np.union1d(lowest, highest)
    return steps[kept], values[kept]


def medians(steps: Floats, values: Floats, buckets: int) -> tuple[Floats, Floats]:
    """The median of the finite values of each bucket, at the bucket's middle step."""
    values = np.where(np.isfinite(values), values, np.nan)
    table = _in_buckets(values, buckets)
    filled = ~np.isnan(table).all(axis=1)
    where = _in_buckets(steps, buckets)[filled]
    return np.nanmedian(where, axis=1), np.nanmedian(table[filled], axis=1)


def thin_matrix(
    matrix: LayerMatrix, *, rows: int = MAX_ROWS, columns: int = MAX_COLUMNS
) -> LayerMatrix:
    """The largest value in each bucket of steps and of neighboring layers.

    Args:
        matrix: Of any size.
        rows: The most layers to keep. Layers that share a row are named by the first and the last.
        columns: The most steps to keep; steps that share a column are named by the middle one.

    Example:
        >>> matrix = LayerMatrix(("a", "b", "c"), np.arange(4.0), np.arange(12.0).reshape(4, 3))
        >>> small = thin_matrix(matrix, rows=2, columns=2)
        >>> small.names, small.steps.tolist(), small.values.tolist()
        (('a … b', 'c'), [0.5, 2.5], [[4.0, 5.0], [10.0, 11.0]])
    """
    names, steps, values = matrix.names, matrix.steps, matrix.values
    if len(steps) > columns:
        starts = np.arange(0, len(steps), -(-len(steps) // columns))
        ends = np.append(starts[1:], len(steps)) - 1
        steps = (steps[starts] + steps[ends]) / 2.0
        values = np.fmax.reduceat(values, starts, axis=0)
    if len(names) > rows:
        width = -(-len(names) // rows)
        firsts = range(0, len(names), width)
        values = np.fmax.reduceat(values, np.asarray(firsts), axis=1)
        names = tuple(_range_name(names[first : first + width]) for first in firsts)
    return LayerMatrix(names, steps, values)


def _in_buckets(values: Floats, buckets: int) -> Floats:
    """Rows of equal length, the last one filled up with NaN."""
    width = max(1, -(-len(values) // buckets))
    rows = -(-len(values) // width)
    padded = np.full(rows * width, np.nan)
    padded[: len(values)] = values
    return padded.reshape(rows, width)


def _range_name(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
