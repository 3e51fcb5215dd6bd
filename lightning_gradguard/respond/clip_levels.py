"""What one segment's gradient norm is clipped to, from its norms so far. Plain values only."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning_gradguard.diagnose import RobustBaseline
from lightning_gradguard.respond.clipping import (
    AdaptiveClip,
    NormClip,
    PercentileClip,
    ThresholdStrategy,
    ZScoreClip,
)

# Clipped steps in a row that are a new level, as in `RobustBaseline`.
ACCEPT_AFTER = 16


class Level(Protocol):
    """Follows the norms of one segment."""

    @property
    def threshold(self) -> float:
        """Norms beyond it are clipped; ``inf`` while nothing is known."""

    @property
    def center(self) -> float:
        """See :func:`clip_target`."""

    def observe(self, norm: float) -> None:
        """Take in the norm of a step before clipping, finite and above 0."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


class FixedLevel:
    """A threshold that depends on nothing."""

    center = -math.inf

    def __init__(self, settings: NormClip) -> None:
        self.threshold = settings.max_norm

    def observe(self, norm: float) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to continue."""


class MedianLevel:
    """A multiple of the running median norm.

    Args:
        settings: Which multiple.
        baseline: A baseline of log-norms that somebody else feeds and saves; default: one of its
            own.
    """

    center = -math.inf

    def __init__(self, settings: AdaptiveClip, baseline: RobustBaseline | None = None) -> None:
        self._settings = settings
        self._own = baseline is None
        self._baseline = RobustBaseline() if baseline is None else baseline

    @property
    def threshold(self) -> float:
        """The multiple of the median."""
        known = self._baseline.ready
        return self._settings.threshold(math.exp(self._baseline.median) if known else None)

    def observe(self, norm: float) -> None:
        """Take in a norm."""
        if self._own:
            self._baseline.update(math.log(norm))

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return self._baseline.state_dict() if self._own else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        if self._own:
            self._baseline.load_state_dict(state)


class PercentileLevel:
    """A percentile of the last norms, with linear interpolation as ``numpy.percentile`` has it.

    Example:
        >>> level = PercentileLevel(PercentileClip(50, window=3))
        >>> for norm in (9.0, 1.0, 2.0, 4.0):
        ...     level.observe(norm)
        >>> level.threshold
        2.0
    """

    center = -math.inf

    def __init__(self, settings: PercentileClip) -> None:
        self._settings = settings
        self._restart(())

    def _restart(self, norms: Sequence[float]) -> None:
        self._order = deque(norms)
        self._sorted = sorted(norms)

    @property
    def threshold(self) -> float:
        """The percentile; ``inf`` while there is no norm."""
        ranked = self._sorted
        if not ranked:
            return math.inf
        rank = (len(ranked) - 1) * self._settings.percentile / 100.0
        low = int(rank)
        high = min(low + 1, len(ranked) - 1)
        return ranked[low] + (rank - low) * (ranked[high] - ranked[low])

    def observe(self, norm: float) -> None:
        """Take in a norm; the oldest leaves a full window."""
        if len(self._order) == self._settings.window:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(norm)
        insort(self._sorted, norm)

    def state_dict(self) -> dict[str, Any]:
        """The norms in order of arrival."""
        return {"norms": list(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; a smaller window keeps the latest norms."""
        self._restart([float(norm) for norm in state["norms"]][-self._settings.window :])


class ZScoreLevel:
    """Running mean μ and deviation σ of the clipped norms; the threshold is μ + z·σ.

    Norms are clipped by the level that they are observed at, which on a fused optimizer is a few
    steps newer than the one that the device clipped by.

    Example:
        >>> level = ZScoreLevel(ZScoreClip(z=2.0, warmup_steps=2))
        >>> level.observe(1.0)
        >>> level.threshold, level.center
        (inf, -inf)
        >>> level.observe(3.0)
        >>> level.threshold, level.center  # the mean is 2 and the deviation 1
        (4.0, 2.0)
    """

    def __init__(self, settings: ZScoreClip) -> None:
        self._settings = settings
        self._first: list[float] = []  # norms of the warmup
        self._run: list[float] = []  # norms of the last steps, if all of them were clipped
        self._mean: float | None = None
        self._deviation = 0.0

    @property
    def threshold(self) -> float:
        """μ + z·σ; ``inf`` during the warmup."""
        if self._mean is None:
            return math.inf
        return self._mean + self._settings.z * self._deviation

    @property
    def center(self) -> float:
        """μ; ``-inf`` during the warmup."""
        return -math.inf if self._mean is None else self._mean

    def observe(self, norm: float) -> None:
        """Take in a norm, clipped; or, after many that were, take them for the new level."""
        if self._mean is None:
            self._first.append(norm)
            if len(self._first) >= self._settings.warmup_steps:
                self._start(self._first)
        elif norm <= self.threshold:
            self._run = []
            self._follow(norm)
        else:
            self._run.append(norm)
            if len(self._run) >= ACCEPT_AFTER:
                self._start(self._run)
            else:
                self._follow(clip_target(norm, self.threshold, self.center))

    def _start(self, norms: list[float]) -> None:
        # Sums of shares and hypot, as sums of squares of large norms overflow.
        self._mean = mean = math.fsum(norm / len(norms) for norm in norms)
        self._deviation = math.hypot(*(norm - mean for norm in norms)) / math.sqrt(len(norms))
        self._first, self._run = [], []

    def _follow(self, norm: float) -> None:
        alpha = self._settings.alpha
        self._mean = mean = alpha * self.center + (1.0 - alpha) * norm
        self._deviation = math.hypot(
            math.sqrt(alpha) * self._deviation, math.sqrt(1.0 - alpha) * (norm - mean)
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "first": list(self._first),
            "run": list(self._run),
            "mean": self._mean,
            "deviation": self._deviation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._first = [float(norm) for norm in state["first"]]
        self._run = [float(norm) for norm in state["run"]]
        self._mean = None if state["mean"] is None else float(state["mean"])
        self._deviation = float(state["deviation"])


def clip_target(norm: float, threshold: float, center: float = -math.inf) -> float:
    """What a finite ``norm`` above ``threshold`` is brought down to.

    Args:
        norm: The norm.
        threshold: Which it exceeds.
        center: Where the threshold t is to be met at t only, and large norms nearer to this center
            c: at c + (t - c)² / (norm - c). Default: they are brought down to the threshold.

    Example:
        >>> clip_target(9.0, threshold=4.0), clip_target(6.0, threshold=4.0, center=2.0)
        (4.0, 3.0)
    """
    if center == -math.inf:
        return threshold
    room = threshold - center
    return center + room * (room / (norm - center))


def make_level(settings: ThresholdStrategy, baseline: RobustBaseline | None = None) -> Level:
    """The level by which ``settings`` clip one segment.

    Args:
        settings: The strategy.
        baseline: See :class:`MedianLevel`; of no use to other strategies.
    """
    if isinstance(settings, AdaptiveClip):
        return MedianLevel(settings, baseline)
    if isinstance(settings, NormClip):
        return FixedLevel(settings)
    if isinstance(settings, PercentileClip):
        return PercentileLevel(settings)
    return ZScoreLevel(settings)
