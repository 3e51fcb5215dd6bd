"""Rows whose values follow from their step, to write into a history and to know again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.run_history import RunHistory, RunInfo
from lightning_gradguard.record.run_writer import RunWriter

ONE = RunInfo("version_0", "project.Net", optimizers=({"label": "", "class": "SGD", "lr": 0.1},))


def step_row(step: int, *, skipped: bool = False, norm: float | None = None) -> StepRecord:
    return StepRecord(
        step,
        loss=None if step % 7 == 0 else step / 4,
        total_norm=step % 100 + 0.5 if norm is None else norm,
        clip_threshold=math.inf if step < 5 else 10.0,
        clip_coef=0.0 if skipped else 1.0,
        max_ratio=0.1,
        capped_tensors=step % 3,
        skipped=skipped,
        lr_scale=1.0,
    )


def layer_norms(step: int, count: int = 3) -> dict[str, float]:
    return {f"layer{number}": step + number / 4 for number in range(count)}


def time_reading(step: int, part: str = "l0") -> TimeReading:
    return TimeReading(
        "encoder.rnn",
        part,
        "exact",
        "lstm",
        timesteps=5,
        sequences=32,
        decay_rate=-step / 8,
        decay_error=0.25,
        steps=4,
        recency=0.5,
        profile=(0.125, 0.25, step / 2),
        causes={"forget_gate": 0.875},
        step=step,
    )


def write_all(writer: RunWriter, steps: Iterable[int], label: str = "") -> None:
    """Write steps with everything that belongs to them, and flush."""
    for step in steps:
        writer.steps(label, [step_row(step)])
        writer.layers(label, step, layer_norms(step))
        writer.updates(label, step, layer_norms(step, 2))
        writer.times(label, [time_reading(step), time_reading(step, "l1")])
    writer.flush()


def write_run(directory: Path, steps: Iterable[int], *, resumed: bool = False) -> None:
    writer = RunWriter(directory, ONE, resumed=resumed)
    write_all(writer, steps)
    writer.close()


def check_all(run: RunHistory, label: str = "") -> list[int]:
    """Every number follows from its step, and steps ascend; returns those of ``steps.csv``."""
    (part,) = (part for part in run.optimizers if part.label == label)
    steps = [int(step) for step in part.steps["step"]]
    assert all(np.diff(steps) > 0)
    for name, values in part.steps.items():
        expected = [getattr(step_row(step), name) for step in steps]
        wanted = np.array([math.nan if value is None else float(value) for value in expected])
        np.testing.assert_allclose(values, wanted, rtol=1e-5)
    for matrix, count in ((part.layers, 3), (part.updates, 2)):
        assert all(np.diff(matrix.steps) > 0)
        numbers = [list(layer_norms(int(step), count).values()) for step in matrix.steps]
        np.testing.assert_allclose(matrix.values, np.reshape(numbers, matrix.values.shape), 1e-3)
    seen = [(reading.step, reading.part) for reading in part.times]
    assert seen == sorted(set(seen))
    for reading in part.times:
        wanted = time_reading(reading.step, reading.part)
        assert reading.to_dict() == {
            **wanted.to_dict(),
            "decay_rate": float(f"{wanted.decay_rate:.6g}"),
            "profile": [float(f"{value:.4g}") for value in wanted.profile],
        }
    return steps
