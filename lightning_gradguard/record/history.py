"""The last steps as numbers, kept in memory and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Reversible
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lightning_gradguard._validation import check_number


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Args:
        step: Number of the step, from 0, counted per optimizer; skipped steps count.
        loss: Mean loss of the step's micro-batches, over all ranks; ``None`` if not known.
        total_norm: Gradient norm before clipping.
        clip_threshold: The largest norm that clipping lets through: the threshold of the total
            norm, or the norm of the segments' thresholds. ``inf`` while there is no baseline, and
            for strategies that are not told by a norm known beforehand (`ValueClip`, `AGC`).
        clip_coef: The gradient norm after clipping divided by that before; 0 for a dropped step.
        max_ratio: The cap on the relative update; ``inf`` when there is none.
        capped_tensors: How many tensors were moved back to the cap.
        skipped: Whether the step was dropped.
        lr_scale: The factor on the learning rate.
    """

    step: int
    loss: float | None
    total_norm: float
    clip_threshold: float
    clip_coef: float
    max_ratio: float
    capped_tensors: int
    skipped: bool
    lr_scale: float


class _OfStep(Protocol):
    @property
    def step(self) -> int: ...


T = TypeVar("T", bound=_OfStep)


def later_than(step: int, items: Reversible[T]) -> list[T]:
    """Those of later steps than ``step``, in order; looks only at them."""
    newer: list[T] = []
    for item in reversed(items):
        if item.step <= step:
            break
        newer.append(item)
    return newer[::-1]


class History:
    """The last ``max_rows`` steps, oldest first.

    Args:
        max_rows: Bound on memory. Default 10,000 rows, about 2 MB.

    Raises:
        TypeError: If ``max_rows`` is not an integer.
        ValueError: If ``max_rows`` is not positive.
    """

    def __init__(self, max_rows: int = 10_000) -> None:
        check_number("max_rows", max_rows, at_least=1, integer=True)
        self._rows: deque[StepRecord] = deque(maxlen=max_rows)

    def append(self, row: StepRecord) -> None:
        """Add one step."""
        self._rows.append(row)

    @property
    def rows(self) -> list[StepRecord]:
        """A copy of the rows."""
        return list(self._rows)

    def since(self, step: int) -> list[StepRecord]:
        """The rows of later steps than ``step``."""
        return later_than(step, self._rows)
