"""How far the gradient reaches through time, as a table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradguard.readings import TimeReading

TABLE_HEADER = ("module", "T", "per step", "half-life", "reaches", "recent tenth", "from")
_LONG = 9999  # steps; from here on a number says nothing that "all" does not


def format_time_table(readings: Sequence[TimeReading], *, dated: bool = False) -> str:
    """One line for each reading, and below the table what could not be measured, with the reason.

    Args:
        readings: In the order in which they should be read.
        dated: Whether to say at which step each was made.

    Example:
        >>> rnn = TimeReading("rnn", "", "exact", "tanh", 50, 32, -0.2231, 0.004, 49, 0.71)
        >>> print(format_time_table([rnn]))
        module   T        per step  half-life   reaches  recent tenth   from
        rnn     50  -0.223 ± 0.004        3.1  31 of 50           71%  exact
    """
    rows = [TABLE_HEADER, *(table_row(reading) for reading in readings)]
    if dated:
        steps = ["at step", *(str(reading.step) for reading in readings)]
        rows = [(*row, step) for row, step in zip(rows, steps, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines += [f"{r.name}: {r.note}" for r in readings if r.note]
    return "\n".join(lines)


def table_row(reading: TimeReading) -> tuple[str, ...]:
    """The cells of one reading, in the order of :data:`TABLE_HEADER`."""
    rate = f"{reading.decay_rate:+.3f}"
    if math.isfinite(reading.decay_error):
        rate += f" ± {reading.decay_error:.3f}"
    recency = f"{reading.recency:.0%}" if math.isfinite(reading.recency) else "-"
    known = math.isfinite(reading.decay_rate)
    return (
        reading.name,
        str(reading.timesteps),
        rate if known else "-",
        _half_life(reading) if known else "-",
        _reach(reading) if known else "-",
        recency,
        reading.source,
    )


def _half_life(reading: TimeReading) -> str:
    steps = reading.half_life
    if steps > _LONG:
        return "-"
    number = f"{steps:.1f}" if steps < 100 else f"{steps:.0f}"
    return number if reading.decay_rate < 0.0 else f"doubles in {number}"


def _reach(reading: TimeReading) -> str:
    """How many of its timesteps the gradient reaches, or by how much it grows on its way."""
    growth = reading.decay_rate * (reading.timesteps - 1)
    if growth > 1.0:
        return f"grows ×{math.exp(min(growth, 700.0)):.2g}"
    if reading.horizon >= reading.timesteps:
        return f"all {reading.timesteps}"
    return f"{reading.horizon:.0f} of {reading.timesteps}"
