"""The table of readings through time, as people see it."""

from __future__ import annotations

import math

import pytest

from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.time_table import format_time_table


def row(**values: object) -> str:
    reading = TimeReading("rnn", "l0", "exact", "lstm", timesteps=50, **values)  # type: ignore[arg-type]
    return format_time_table([reading]).splitlines()[1]


@pytest.mark.parametrize(
    ("rate", "half_life", "reach"),
    [
        (-0.2231, " 3.1 ", "31 of 50"),
        (-0.01, " 69.3 ", "all 50"),
        (0.01, "doubles in 69.3", "all 50"),
        (0.0, " - ", "all 50"),
        (0.2, "doubles in 3.5", "grows ×1.8e+04"),
        (50.0, "doubles in 0.0", "grows ×1e+304"),
        (math.nan, " - ", " - "),
    ],
)
def test_half_life_and_reach(rate: float, half_life: str, reach: str) -> None:
    line = row(decay_rate=rate)
    assert half_life in line
    assert reach in line


def test_an_interval_is_shown_if_it_is_known() -> None:
    assert "-0.223 ± 0.004" in row(decay_rate=-0.2231, decay_error=0.004)
    assert "±" not in row(decay_rate=-0.2231)


def test_columns_line_up_and_reasons_come_below() -> None:
    readings = [
        TimeReading("encoder.rnn", "l0", "exact", timesteps=1000, decay_rate=-0.1, recency=0.5),
        TimeReading("r", "", "input", timesteps=5, note="the loss enters at several timesteps"),
    ]
    header, first, second, note = format_time_table(readings).splitlines()
    assert len(header) == len(first)
    assert header.index("recent tenth") + len("recent tenth") == first.index("50%") + len("50%")
    assert second.split() == ["r", "5", "-", "-", "-", "-", "input"]
    assert note == "r: the loss enters at several timesteps"
