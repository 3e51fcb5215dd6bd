"""How large a relative update is allowed, and how that follows the progress of the loss."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_gradguard._validation import check_number, check_type


@dataclass(frozen=True)
class UpdateCap:
    """Let no tensor move by more than ``max_ratio`` of its own norm in one step.

    With ``adaptive``, the cap is tightened while it binds and the loss does not improve, and
    loosened back while it does.

    Args:
        max_ratio: The widest cap. Default 0.03.
        adaptive: Whether the cap follows the loss. Default ``True``.
        window: Steps between two looks at the loss. Default 25.
        min_ratio: The tightest cap. Default ``max_ratio / 30``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> UpdateCap(max_ratio=0.05).lower_bound
        0.0016666666666666668
    """

    max_ratio: float = 0.03
    adaptive: bool = True
    window: int = 25
    min_ratio: float | None = None

    def __post_init__(self) -> None:
        check_number("max_ratio", self.max_ratio, above=0.0)
        check_type("adaptive", self.adaptive, bool, "True or False")
        check_number("window", self.window, at_least=2, integer=True)
        if self.min_ratio is not None:
            check_number("min_ratio", self.min_ratio, above=0.0, at_most=self.max_ratio)

    @property
    def lower_bound(self) -> float:
        """The tightest cap, filled in."""
        return self.max_ratio / 30 if self.min_ratio is None else self.min_ratio


class RatioSchedule:
    """The cap at each step, from the losses and from how often it bound.

    Plain values in and out, so that every rank that sees the same losses holds the same cap.
    """

    DOWN = 0.6
    UP = 1.15
    BETTER = 0.97

    def __init__(self, settings: UpdateCap) -> None:
        self.settings = settings
        self.ratio = settings.max_ratio
        self._losses: deque[float] = deque(maxlen=2 * settings.window)
        self._steps = 0
        self._bound = 0.0

    def advance(self, loss: float | None, capped_share: float) -> float:
        """Account for one step; returns the factor by which the cap changed (1.0 for none).

        Args:
            loss: Loss of the step, if known.
            capped_share: Share of tensors that were moved back to the cap, in [0, 1].
        """
        if not self.settings.adaptive or loss is None:
            return 1.0
        self._losses.append(loss if math.isfinite(loss) else math.inf)
        self._bound += capped_share
        self._steps += 1
        if self._steps % self.settings.window:
            return 1.0
        bound, self._bound = self._bound / self.settings.window, 0.0
        if len(self._losses) < 2 * self.settings.window:
            return 1.0
        return self._compare(bound)

    def _compare(self, bound: float) -> float:
        losses = list(self._losses)
        before = median(losses[: self.settings.window])
        now = median(losses[self.settings.window :])
        old = self.ratio
        if now < self.BETTER * before:
            self.ratio = min(self.ratio * self.UP, self.settings.max_ratio)
        elif bound > 0.0:
            self.ratio = max(self.ratio * self.DOWN, self.settings.lower_bound)
        return self.ratio / old

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "ratio": self.ratio,
            "losses": list(self._losses),
            "steps": self._steps,
            "bound": self._bound,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.ratio = float(state["ratio"])
        self._losses = deque(map(float, state["losses"]), maxlen=2 * self.settings.window)
        self._steps = int(state["steps"])
        self._bound = float(state["bound"])
