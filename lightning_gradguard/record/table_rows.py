"""The rows of a run's history as lines of CSV, and back."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from lightning_gradguard.readings import TimeReading
from lightning_gradguard.readings.time import MAX_BINS
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.plain_values import plain_values
from lightning_gradguard.record.run_history import STEP_COLUMNS, Floats, LayerMatrix
from lightning_gradguard.record.table_file import csv_cells, csv_line, read_table, step_of
from lightning_gradguard.record.thinning import Facts, not_done_again

# What a plot of 2,000 pixels shows is three digits; these leave room to compute with.
_DIGITS = "%.6g"
_MATRIX_DIGITS = "%.4g"

_STEP_ROW = f"%d,{','.join([_DIGITS] * 5)},%d,%d,{_DIGITS}\n"

_PROFILE = tuple(f"p{number}" for number in range(MAX_BINS))
_ENTRY = tuple(f"e{number}" for number in range(MAX_BINS))
_TEXTS = ("module", "part", "source", "kind")
_COUNTS = ("timesteps", "sequences", "steps")
_NUMBERS = ("decay_rate", "decay_error", "recency")
# Text with commas comes last: readers that know no quotes can stop before it.
TIME_COLUMNS = ("step", *_TEXTS, *_COUNTS, *_NUMBERS, *_PROFILE, *_ENTRY, "causes", "note")


# -- steps ----------------------------------------------------------------------------------------


def step_lines(rows: Sequence[StepRecord]) -> list[bytes]:
    r"""One line for each step.

    Example:
        >>> step_lines([StepRecord(7, None, 0.123456789, math.inf, 1.0, 0.1, 0, False, 1.0)])
        [b'7,nan,0.123457,inf,1,0.1,0,0,1\n']
    """
    return [
        (
            _STEP_ROW
            % (
                row.step,
                math.nan if row.loss is None else row.loss,
                row.total_norm,
                row.clip_threshold,
                row.clip_coef,
                row.max_ratio,
                row.capped_tensors,
                row.skipped,
                row.lr_scale,
            )
        ).encode()
        for row in rows
    ]


def step_facts(lines: Sequence[bytes]) -> Facts:
    """Of steps that are close to each other that of the largest norm stays; a dropped one does."""
    wanted = [STEP_COLUMNS.index(name) for name in ("step", "total_norm", "skipped")]
    step, norm, skipped = _numbers(lines, len(STEP_COLUMNS))[:, wanted].T
    weights = np.where(np.isfinite(norm), norm, np.inf)
    return Facts(step.astype(np.int64), weights, np.zeros(len(step), np.int64), skipped > 0)


def read_steps(path: Path) -> dict[str, Floats]:
    """The columns of ``steps.csv``; NaN in one that it does not have."""
    return steps_of(*read_table(path))


def steps_of(columns: Sequence[str], lines: Sequence[bytes]) -> dict[str, Floats]:
    """The same from some of its lines."""
    values = _current(_readable_numbers(lines, len(columns)))
    unknown = np.full(len(values), np.nan)
    found = dict(zip(columns, values.T, strict=False))
    return {name: found.get(name, unknown) for name in STEP_COLUMNS}


# -- one number per layer -------------------------------------------------------------------------


def matrix_lines(
    columns: Sequence[str], rows: Sequence[tuple[int, Mapping[str, float]]]
) -> list[bytes]:
    r"""One line for each step; a layer without a value has NaN.

    Args:
        columns: The step, then the layers.
        rows: Steps with the numbers of their layers.

    Example:
        >>> matrix_lines(["step", "a", "b"], [(5, {"b": 0.123456})])
        [b'5,nan,0.1235\n']
    """
    layers = columns[1:]
    row_format = ",".join(["%d", *[_MATRIX_DIGITS] * len(layers)]) + "\n"
    return [
        (row_format % (step, *[values.get(layer, math.nan) for layer in layers])).encode()
        for step, values in rows
    ]


def matrix_facts(lines: Sequence[bytes]) -> Facts:
    """All rows are alike."""
    return Facts.of_steps(np.array([step_of(line) for line in lines], np.int64))


def read_matrix(path: Path) -> LayerMatrix:
    """The layers of ``layers.csv`` or ``updates.csv`` and their numbers."""
    columns, lines = read_table(path)
    values = _current(_readable_numbers(lines, len(columns)))
    return LayerMatrix(columns[1:], values[:, 0], values[:, 1:]) if columns else LayerMatrix()


# -- readings through time ------------------------------------------------------------------------


def time_line(reading: TimeReading) -> bytes:
    """The line of a reading; what its curves are shorter than the columns stays empty."""
    causes = {name: float(_DIGITS % cause) for name, cause in reading.causes.items()}
    return csv_line(
        (
            str(reading.step),
            *(getattr(reading, name) for name in _TEXTS),
            *(str(getattr(reading, name)) for name in _COUNTS),
            *(_DIGITS % getattr(reading, name) for name in _NUMBERS),
            *_bins(reading.profile),
            *_bins(reading.entry),
            json.dumps(plain_values(causes)),
            reading.note,
        )
    )


def _bins(values: Sequence[float]) -> list[str]:
    values = values[:MAX_BINS]
    cells = " ".join([_MATRIX_DIGITS] * len(values)) % tuple(values)
    return cells.split() + [""] * (MAX_BINS - len(values))


def time_facts(lines: Sequence[bytes]) -> Facts:
    """Each module, layer and direction is a series of its own, whose newest reading stays."""
    names: dict[tuple[object, ...], int] = {}
    groups = np.array([names.setdefault(_name(line), len(names)) for line in lines], np.int64)
    newest = len(lines) - 1 - np.unique(groups[::-1], return_index=True)[1]
    facts = matrix_facts(lines)
    return replace(facts, groups=groups, kept=np.isin(np.arange(len(lines)), newest))


def _name(line: bytes) -> tuple[object, ...]:
    _, module, part, _ = line.split(b",", 3)
    return tuple(csv_cells(line)[1:3]) if b'"' in module else (module, part)


def read_times(path: Path) -> tuple[TimeReading, ...]:
    """The readings in ``timesteps.csv``, oldest first."""
    return times_of(*read_table(path))


def times_of(columns: Sequence[str], lines: Sequence[bytes]) -> tuple[TimeReading, ...]:
    """The same from some of its lines."""
    readings: dict[tuple[int, str], TimeReading] = {}
    found = [reading for line in lines if (reading := _reading(columns, line)) is not None]
    current = not_done_again(np.array([r.step for r in found], np.int64), shared=True)
    for reading, stays in zip(found, current, strict=True):
        if stays:
            readings[reading.step, reading.name] = reading
    return tuple(readings.values())


def _reading(columns: Sequence[str], line: bytes) -> TimeReading | None:
    """The reading in a line; ``None`` if it is damaged."""
    try:
        cells = dict(zip(columns, csv_cells(line), strict=True))
        causes = json.loads(cells["causes"])
        values: dict[str, Any] = {
            **{name: cells[name] for name in (*_TEXTS, "note")},
            **{name: int(cells[name]) for name in ("step", *_COUNTS)},
            **{name: float(cells[name]) for name in _NUMBERS},
            "profile": [float(cells[name]) for name in _PROFILE if cells[name]],
            "entry": [float(cells[name]) for name in _ENTRY if cells[name]],
            "causes": {name: float(cause) for name, cause in causes.items()},
        }
    except (ValueError, KeyError):
        return None
    return TimeReading.from_dict(values)


# -- numbers --------------------------------------------------------------------------------------


def _numbers(lines: Sequence[bytes], columns: int) -> Floats:
    """All numbers of lines, shape ``(rows, columns)``.

    Raises:
        ValueError: If a line is none of that many numbers.
    """
    if not lines:
        return np.empty((0, columns))
    values: Floats = np.loadtxt(io.BytesIO(b"".join(lines)), delimiter=",", comments=None, ndmin=2)
    if values.shape != (len(lines), columns):
        raise ValueError(f"lines must have {columns} numbers each, got {values.shape[1]}")
    return values


def _readable_numbers(lines: Sequence[bytes], columns: int) -> Floats:
    try:
        return _numbers(lines, columns)
    except ValueError:  # a machine that lost its power leaves zeros where lines should be
        rows = [_row(line, columns) for line in lines]
        return cast("Floats", np.array([row for row in rows if row]).reshape(-1, columns))


def _row(line: bytes, columns: int) -> list[float]:
    try:
        row = [float(cell) for cell in line.split(b",")]
    except ValueError:
        return []
    return row if len(row) == columns else []


def _current(values: Floats) -> Floats:
    return values[not_done_again(values[:, 0].astype(np.int64))] if len(values) else values
