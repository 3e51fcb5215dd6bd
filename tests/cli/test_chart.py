"""Columns of block characters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.cli.chart import columns_of, draw

BLOCKS = " ▁▂▃▄▅▆▇█"


def heights(lines: tuple[str, ...]) -> list[int]:
    """Eighths of a line, of each column."""
    return [sum(BLOCKS.index(cell) for cell in column) for column in zip(*lines, strict=True)]


@given(st.integers(0, 300), st.integers(1, 100))
def test_columns_hold_every_row_once_and_in_order(rows, width):
    columns = columns_of(rows, width)

    assert [n for column in columns for n in range(rows)[column]] == list(range(rows))
    assert len(columns) == min(rows, width)
    sizes = [column.stop - column.start for column in columns]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


@given(st.lists(st.floats(), max_size=40), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_any_numbers_can_be_drawn(values, width, height, log):
    chart = draw(np.array(values, dtype=float), width, height, log=log)

    assert len(chart.lines) == height
    assert {len(line) for line in chart.lines} == {min(len(values), width)}
    usable = [v for v in values if math.isfinite(v) and (v > 0.0 or not log)]
    if usable:
        assert (chart.low, chart.high) == (min(usable), max(usable))
    else:
        assert math.isnan(chart.low)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.integers(1, 4))
def test_a_larger_number_is_never_drawn_lower(values, height):
    drawn = heights(draw(np.array(values), 80, height).lines)

    ordered = [column for _, column in sorted(zip(values, drawn, strict=True))]
    assert ordered == sorted(ordered)
    if max(values) > min(values):
        assert (min(drawn), max(drawn)) == (1, 8 * height)


def test_the_largest_of_a_column_counts_so_that_a_spike_is_seen():
    values = np.ones(1000)
    values[777] = 100.0

    drawn = heights(draw(values, 50, 3).lines)
    assert [n for n, column in enumerate(drawn) if column == 24] == [777 * 50 // 1000]


def test_a_logarithm_makes_equal_factors_equal_steps():
    drawn = heights(draw(10.0 ** np.arange(-4, 5), 80, 4, log=True).lines)

    assert len(set(np.diff(drawn))) <= 2  # but for rounding
    assert (drawn[0], drawn[-1]) == (1, 32)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([math.inf, 1.0, math.nan, 2.0], "×▁ █"),
        ([math.inf, math.nan], "× "),
        ([3.0], "▄"),
        ([], ""),
    ],
)
def test_what_cannot_be_drawn_is_a_cross_and_what_is_not_there_a_gap(values, line):
    assert draw(np.array(values, dtype=float), 80, 1).lines == (line,)
