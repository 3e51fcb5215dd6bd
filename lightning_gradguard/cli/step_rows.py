"""Steps as records again, of which a run has columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_gradguard.cli.chart import Floats
from lightning_gradguard.record import StepRecord
from lightning_gradguard.record.guard_state import STATE_STEPS


def last_rows(steps: Mapping[str, Floats], count: int = STATE_STEPS) -> list[StepRecord]:
    """The last rows of the columns of a run, oldest first.

    Args:
        steps: As :attr:`OptimizerHistory.steps`.
        count: How many, at most.
    """
    first = max(len(steps["step"]) - count, 0)
    return [
        _record({name: float(column[row]) for name, column in steps.items()})
        for row in range(first, len(steps["step"]))
    ]


def _record(row: Mapping[str, float]) -> StepRecord:
    return StepRecord(
        step=int(row["step"]),
        loss=None if math.isnan(row["loss"]) else row["loss"],
        total_norm=row["total_norm"],
        clip_threshold=row["clip_threshold"],
        clip_coef=row["clip_coef"],
        max_ratio=row["max_ratio"],
        capped_tensors=int(row["capped_tensors"]),
        skipped=bool(row["skipped"]),
        lr_scale=row["lr_scale"],
    )
