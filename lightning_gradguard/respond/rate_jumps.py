"""Follow a learning rate that leaps by degrees, as a warm-up would have led to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# What the rate that is followed may rise by in a step: tenfold in 47 steps, which is a short
# warm-up, and 1.6-fold in the 10 steps after which a slip may have been undone.
_GROWTH = 1.05
# A warm-up from nearly nothing leaps at its first step.
_FIRST_STEPS = 10


class FollowedRate:
    """The factor on the learning rate while it is on its way to where it has leapt.

    A leap takes the rate far beyond what it has been in the run: a warm restart is none. A fall is
    followed at once.

    Args:
        max_leap: How far beyond its highest value the rate may rise without being held back.

    Attributes:
        scale: The factor.

    Example:
        >>> followed = FollowedRate(max_leap=8.0)
        >>> rates = [*[0.1] * 20, 100.0, 100.0, 0.1]
        >>> [round(followed.follow([lr]), 5) for lr in rates][-4:]
        [1.0, 0.00105, 0.0011, 1.0]
    """

    def __init__(self, max_leap: float) -> None:
        self._max_leap = max_leap
        self._peaks: list[float] = []
        self._steps = 0
        self._allowed = 0.0  # times the peaks, while it is held back
        self.scale = 1.0

    @property
    def steps_left(self) -> int:
        """How many steps it takes to catch up with a rate that stays where it is."""
        return math.ceil(-math.log(self.scale) / math.log(_GROWTH))

    def follow(self, rates: Sequence[float]) -> float:
        """Take in the rates of the coming step; returns the factor on all of them.

        Args:
            rates: Of every parameter group; NaN where not known. Only if all of them leap is it
                the run that leaps: one alone may have been unfrozen.
        """
        if len(rates) != len(self._peaks) or any(map(math.isnan, rates)):
            self._peaks, self._steps, self._allowed = list(rates), 0, 0.0
        rise = _least_rise(self._peaks, rates)
        if self._allowed:
            self._allowed *= _GROWTH
        elif self._steps >= _FIRST_STEPS and self._max_leap < rise < math.inf:
            self._allowed = _GROWTH
        if rise > self._allowed > 0.0:
            self.scale = self._allowed / rise
        else:
            self.scale, self._allowed = 1.0, 0.0
            self._peaks = [max(pair) for pair in zip(self._peaks, rates, strict=True)]
        self._steps += 1
        return self.scale

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "peaks": list(self._peaks),
            "steps": self._steps,
            "allowed": self._allowed,
            "scale": self.scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._peaks = [float(rate) for rate in state["peaks"]]
        self._steps = int(state["steps"])
        self._allowed = float(state["allowed"])
        self.scale = float(state["scale"])


def _least_rise(peaks: Sequence[float], rates: Sequence[float]) -> float:
    """Beyond the peaks; infinite for rates that have all just left zero."""
    pairs = zip(peaks, rates, strict=True)
    rises = [rate / peak if peak > 0.0 else math.inf for peak, rate in pairs if rate > 0.0]
    return min(rises, default=0.0)
