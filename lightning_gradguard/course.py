"""When a run changes course, so that what was usual before is no measure of what comes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# A decay by steps, a warm restart or a wrong setting at least halves or doubles the rate, and moves
# it by that much more than the step before did. A schedule on its way to zero (cosine) or from it
# (warm-up) doubles or halves the rate too, but goes on as it went.
LR_JUMP = 2.0


class Course:
    """Compares the learning rates and the trained parameters of each step with the step before.

    Args:
        optimizer: The optimizer whose run is followed.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> course = Course(optimizer)
        >>> course.changed((True, True))
        False
        >>> optimizer.param_groups[0]["lr"] = 0.01  # as a schedule that decays by steps
        >>> course.changed((True, True)), course.changed((True, True))
        (True, False)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._rates: list[float] = []
        self._moves: list[float] = []  # of each rate by the last step; the first came from zero
        self._present: tuple[bool, ...] = ()
        self._trained: int | None = None

    @property
    def lr(self) -> float:
        """Learning rate of the first group at the last step; NaN if not known."""
        return self._rates[0] if self._rates else math.nan

    @property
    def rates(self) -> list[float]:
        """Learning rate of each group at the last step; NaN if not known."""
        return list(self._rates)

    def changed(self, present: tuple[bool, ...]) -> bool:
        """Takes in one step; returns whether the run changed course before it.

        Args:
            present: Which of the optimizer's parameters have a gradient. They are only counted
                anew when that changes: a mixture of experts uses others at every step.
        """
        rates = self._learning_rates()
        jumped, moves = False, list(rates)
        if len(rates) == len(self._rates):
            moves = [now - before for before, now in zip(self._rates, rates, strict=True)]
            jumped = any(
                _far_apart(before, now) and _is_sudden(last, move)
                for before, now, last, move in zip(
                    self._rates, rates, self._moves, moves, strict=True
                )
            )
        self._rates, self._moves = rates, moves
        regrouped = False
        if present != self._present:
            self._present = present
            groups = self._optimizer.param_groups
            trained = sum(p.requires_grad for group in groups for p in group["params"])
            regrouped = self._trained not in (None, trained)
            self._trained = trained
        return jumped or regrouped

    def _learning_rates(self) -> list[float]:
        """Of each group; NaN where reading it would make the host wait for a device."""
        rates = (group.get("lr", math.nan) for group in self._optimizer.param_groups)
        return [
            math.nan if isinstance(rate, Tensor) and rate.device.type != "cpu" else float(rate)
            for rate in rates
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {"rates": list(self._rates), "moves": list(self._moves), "trained": self._trained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: a run resumed at another rate has changed course."""
        self._rates, self._moves = list(state["rates"]), list(state["moves"])
        self._trained = state["trained"]
        self._present = ()


def _far_apart(before: float, now: float) -> bool:
    # A rate that was zero had no effect to get used to; NaN compares as false.
    low, high = min(before, now), max(before, now)
    return low > 0.0 and high >= LR_JUMP * low


def _is_sudden(last: float, move: float) -> bool:
    return last * move < 0.0 or abs(move) > LR_JUMP * abs(last)
