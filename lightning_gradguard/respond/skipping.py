"""Drop a step whose gradient would poison the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gradguard._validation import check_number


@dataclass(frozen=True)
class SkipBadSteps:
    """Leave parameters and optimizer state untouched on a step with a bad gradient.

    Args:
        outlier_factor: A gradient norm beyond this multiple of the run's own median is dropped.
            Default 1000: clipping already bounds what smaller outliers can do; beyond three
            decades the direction itself is not to be trusted. ``inf`` drops non-finite ones only.
        max_consecutive: Budget of skips in a row; once it is spent the run cannot be saved by
            skipping and is asked to stop. Default 50.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.

    Example:
        >>> SkipBadSteps().limit(median_norm=0.5)
        500.0
    """

    outlier_factor: float = 1000.0
    max_consecutive: int = 50

    def __post_init__(self) -> None:
        check_number("outlier_factor", self.outlier_factor, above=1.0)
        check_number("max_consecutive", self.max_consecutive, at_least=1, integer=True)

    def limit(self, median_norm: float | None) -> float:
        """Gradient norm beyond which a step is dropped (``inf`` while there is no baseline)."""
        return math.inf if median_norm is None else self.outlier_factor * median_norm


class SkipBudget:
    """Counts skipped steps: in total and in a row."""

    def __init__(self, settings: SkipBadSteps) -> None:
        self.settings = settings
        self.total = 0
        self.consecutive = 0

    def record(self, skipped: bool) -> None:
        """Account for one step."""
        self.total += skipped
        self.consecutive = self.consecutive + 1 if skipped else 0

    @property
    def spent(self) -> bool:
        """Whether the budget of consecutive skips is used up."""
        return self.consecutive >= self.settings.max_consecutive

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {"total": self.total, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.total = int(state["total"])
        self.consecutive = int(state["consecutive"])


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Set every gradient to ``None``, so that ``optimizer.step()`` changes nothing.

    A zeroed gradient is not a skip: Adam still moves by its momentum, and its step count advances.
    """
    for parameter in parameters:
        parameter.grad = None
