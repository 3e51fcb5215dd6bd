"""How large a relative update is allowed, and how that follows the progress of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_gradguard._validation import check_number, check_type

# Standard error of a median of n normal values, in units of their scale / sqrt(n).
_MEDIAN_ERROR = 1.2533
_MAD_TO_SCALE = 1.4826


@dataclass(frozen=True)
class UpdateCap:
    """Let no tensor move by more than a share of its own norm in one step.

    With ``adaptive``, the share is tightened while updates are large and the loss does not improve
    beyond its noise, and loosened otherwise. The reasons for the defaults, with the trials that
    led to them, are in ``docs/default-response.md``.

    Args:
        max_ratio: The widest share. Default 0.1.
        start_ratio: The share at the start. Default 0.3 · ``max_ratio``.
        min_ratio: The tightest share. Default ``max_ratio`` / 30, or ``start_ratio`` if less.
        adaptive: Whether the share follows the loss; otherwise it stays at ``max_ratio``.
        window: Steps between the first looks at the loss. Default 25; as improvement slows down,
            the window grows with the run, to a sixteenth of it.
        tighten: Factor on the share when the loss does not improve. Default 0.8.
        loosen: Factor on the share otherwise. Default 1.25.
        confidence: The improvement that counts, in standard errors. Default 2.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> UpdateCap(max_ratio=0.02, start_ratio=0.05)
        Traceback (most recent call last):
        ...
        ValueError: start_ratio must be a number > 0 and <= 0.02, got 0.05
    """

    max_ratio: float = 0.1
    start_ratio: float | None = None
    min_ratio: float | None = None
    adaptive: bool = True
    window: int = 25
    tighten: float = 0.8
    loosen: float = 1.25
    confidence: float = 2.0

    def __post_init__(self) -> None:
        check_number("max_ratio", self.max_ratio, above=0.0)
        if self.start_ratio is not None:
            check_number("start_ratio", self.start_ratio, above=0.0, at_most=self.max_ratio)
        if self.min_ratio is not None:
            check_number("min_ratio", self.min_ratio, above=0.0, at_most=self.first_ratio)
        check_type("adaptive", self.adaptive, bool, "True or False")
        check_number("window", self.window, at_least=2, integer=True)
        check_number("tighten", self.tighten, above=0.0, below=1.0)
        check_number("loosen", self.loosen, above=1.0)
        check_number("confidence", self.confidence, at_least=0.0)

    @property
    def first_ratio(self) -> float:
        """``start_ratio``, filled in."""
        return 0.3 * self.max_ratio if self.start_ratio is None else self.start_ratio

    @property
    def least_ratio(self) -> float:
        """``min_ratio``, filled in."""
        if self.min_ratio is None:
            return min(self.max_ratio / 30, self.first_ratio)
        return self.min_ratio

    @property
    def large_ratio(self) -> float:
        """What counts as a large update: half the widest share."""
        return 0.5 * self.max_ratio


class RatioSchedule:
    """The cap at each step, from the losses and from how many updates were large.

    Plain values in and out, so that every rank that sees the same losses holds the same cap. Only
    differences of losses against their own spread decide: scaling or shifting the loss changes
    nothing.
    """

    # Of the tensors, over a window: an ordinary learning rate makes few updates large, and then
    # what the loss does is not for the cap to answer, be it a plateau or noise.
    _MANY = 0.5
    # Windows stop growing here, which bounds the memory.
    _LONGEST = 500
    _SHARE_OF_RUN = 16

    def __init__(self, settings: UpdateCap) -> None:
        self.settings = settings
        self.ratio = settings.first_ratio if settings.adaptive else settings.max_ratio
        self._before: list[float] = []
        self._now: list[float] = []
        self._large = 0.0
        self._steps = 0

    def advance(self, loss: float | None, large_share: float) -> float:
        """Account for one step; returns the factor by which the cap changed (1.0 for none).

        Args:
            loss: Loss of the step, if known.
            large_share: Share of tensors whose update would have been large, in [0, 1].
        """
        if not self.settings.adaptive or loss is None:
            return 1.0
        self._now.append(loss if math.isfinite(loss) else math.inf)
        self._large += large_share
        self._steps += 1
        if len(self._now) < self._window:
            return 1.0
        old = self.ratio
        if self._before:
            self.ratio = self._adapted(self._large / len(self._now))
        self._before, self._now, self._large = self._now, [], 0.0
        return self.ratio / old

    @property
    def _window(self) -> int:
        grown = min(self._steps // self._SHARE_OF_RUN, self._LONGEST)
        return max(self.settings.window, grown)

    def _adapted(self, large_share: float) -> float:
        settings = self.settings
        if large_share > self._MANY and not _improved(self._before, self._now, settings.confidence):
            return max(self.ratio * settings.tighten, settings.least_ratio)
        return min(self.ratio * settings.loosen, settings.max_ratio)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "ratio": self.ratio,
            "before": list(self._before),
            "now": list(self._now),
            "large": self._large,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.ratio = float(state["ratio"])
        self._before = [float(loss) for loss in state["before"]]
        self._now = [float(loss) for loss in state["now"]]
        self._large = float(state["large"])
        self._steps = int(state["steps"])


def _improved(before: list[float], now: list[float], confidence: float) -> bool:
    """Whether the median fell by more than ``confidence`` standard errors of the difference."""
    center_before, center_now = median(before), median(now)
    if not math.isfinite(center_now):
        return False
    if not math.isfinite(center_before):
        return True
    deviations = [abs(loss - center_before) for loss in before]
    deviations += [abs(loss - center_now) for loss in now]
    scale = _MAD_TO_SCALE * median(deviations)
    error = _MEDIAN_ERROR * scale * math.sqrt(1.0 / len(before) + 1.0 / len(now))
    return center_before - center_now > confidence * error
