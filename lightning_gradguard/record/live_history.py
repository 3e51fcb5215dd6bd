"""A run as it is known in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np

from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.recorder import Recorder
from lightning_gradguard.record.run_history import OptimizerHistory


def live_history(recorder: Recorder, counts: Mapping[str, int]) -> OptimizerHistory:
    """What a recorder still has of one optimizer: the last steps and readings, no layers.

    Args:
        recorder: It.
        counts: Running counts by name.

    Example:
        >>> recorder = Recorder()
        >>> recorder.step(StepRecord(0, None, 0.5, 1.0, 1.0, 0.1, 0, False, 1.0))
        >>> live_history(recorder, {"steps": 1}).steps["total_norm"]
        array([0.5])
    """
    rows = recorder.history
    columns = {
        column.name: np.array([_number(getattr(row, column.name)) for row in rows])
        for column in fields(StepRecord)
    }
    return OptimizerHistory(
        label=recorder.label,
        steps=columns,
        times=tuple(recorder.readings),
        findings=tuple(recorder.findings),
        actions=tuple(recorder.actions),
        counts=dict(counts),
    )


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
