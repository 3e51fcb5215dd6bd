"""The level of the loss over the whole run: has it stopped falling, and since how early?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from lightning_gradguard.diagnose.baseline import MAD_TO_SCALE, RESOLUTION
from lightning_gradguard.diagnose.thresholds import Thresholds

# Points kept; a full series is halved, so a point covers 1/32 to 1/64 of the run so far.
MAX_POINTS = 64


class LossStages:
    """A series of levels over the whole run, in bounded memory, and what it says.

    Each point is the mean of as many block levels as any other; when the series is full, pairs of
    points become one. The noise of a point is taken from the moves between neighbors, so that a
    trend does not pass for noise.

    Args:
        thresholds: The numbers that decide.
    """

    __slots__ = ("_flat", "_parts", "_thresholds", "_total", "points", "stride")

    _flat: tuple[bool, bool] | None
    _parts: int
    _total: float
    points: list[float]
    stride: int

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self.reset()

    @property
    def ready(self) -> bool:
        """Whether there are enough points for an early stage, a middle and a present one."""
        return len(self.points) >= self._thresholds.stage_points

    @property
    def present(self) -> float:
        """Level of the last quarter of the run; needs `ready`."""
        return fmean(self._last_quarter())

    def enter(self, level: float) -> None:
        """Enters the level of a block."""
        self._total += level
        self._parts += 1
        if self._parts < self.stride:
            return
        points = self.points
        points.append(self._total / self.stride)
        self._total, self._parts, self._flat = 0.0, 0, None
        if len(points) == MAX_POINTS:
            self.points = [
                0.5 * first + 0.5 * second
                for first, second in zip(points[::2], points[1::2], strict=True)
            ]
            self.stride *= 2

    def is_flat(self, *, positive: bool) -> bool:
        """Whether the level has not fallen beyond noise since the stage from 1/8 to 1/4 of the run.

        Nor does a robust trend over all points after the first steps.

        Args:
            positive: Whether the loss has a natural zero, so that a share of it means something.
        """
        if self._flat is None or self._flat[0] != positive:
            points = self.points
            count = len(points)
            early = points[count // 8 : max(count // 4, count // 8 + 1)]
            improved = self._is_better(early, self._last_quarter(), positive)
            self._flat = positive, not (improved or self._is_falling(positive))
        return self._flat[1]

    def is_stuck(self, share: float, slack: float, latest: float, *, positive: bool) -> bool:
        """Whether the level is flat and was reached within the first `share` of the run so far.

        No where the noise is too large to tell.

        Args:
            share: End of the early stage, as a share of the run so far; it begins at half of that.
            slack: How far above the present level an early one counts as the same.
            latest: Level of the last losses, half a block.
            positive: See `is_flat`.
        """
        if not self.ready:
            return False
        early, last = self._early(share), self._last_quarter()
        if positive and not self._can_tell(early, last):
            return False
        if self._is_better(early, last, positive, slack=slack):
            return False
        if not self.is_flat(positive=positive):
            return False
        # A drop that has just begun: half a block weighs less than a point.
        blur = math.sqrt(2.0 * self.stride)
        return not self._is_better(early, [latest], positive, slack=slack, blur=blur)

    def is_steepest(self) -> bool:
        """Whether the level has never fallen faster than now, over several points."""
        moves = [b - a for a, b in pairwise(self.points)]
        window = self._thresholds.runaway_points
        if len(moves) < 2 * window or max(moves[-window:]) >= 0.0:
            return False
        paces = [sum(moves[end - window : end]) for end in range(window, len(moves) + 1)]
        return paces[-1] <= self._thresholds.runaway_pace * min(paces)

    def flat_blocks(self, *, positive: bool) -> int:
        """Blocks since all but a tenth of the levels are near the present one; needs `ready`.

        Near is within noise, or within `level_margin` of a positive level.
        """
        t, present = self._thresholds, self.present
        share = t.level_margin if positive else RESOLUTION
        bound = max(t.margin * self._noise(), share * abs(present))
        flat = far = 0
        for length, level in enumerate(reversed(self.points), 1):
            is_far = abs(level - present) > bound
            far += is_far
            if not is_far and far <= 0.1 * length:
                flat = length
        return flat * self.stride + self._parts

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers and lists."""
        return {
            "points": list(self.points),
            "stride": self.stride,
            "total": self._total,
            "parts": self._parts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self.points = list(state["points"])
        self.stride = state["stride"]
        self._total = state["total"]
        self._parts = state["parts"]
        self._flat = None

    def reset(self) -> None:
        """Forgets everything."""
        self.points = []
        self.stride = 1
        self._total, self._parts, self._flat = 0.0, 0, None

    def _early(self, share: float) -> list[float]:
        count = len(self.points)
        begin = int(0.5 * share * count)
        return self.points[begin : max(int(share * count), begin + 1)]

    def _last_quarter(self) -> list[float]:
        return self.points[-max(1, len(self.points) // 4) :]

    def _noise(self) -> float:
        """Deviation of one point, from the moves between neighbors."""
        points = self.points
        moves = [abs(b - a) for a, b in pairwise(points)]
        return MAD_TO_SCALE * median(moves) / math.sqrt(2.0) if moves else 0.0

    def _error(self, before: Sequence[float], after: Sequence[float], blur: float = 1.0) -> float:
        """Standard error of the difference of two levels; `blur`: noise of `after`, in points."""
        return self._noise() * math.sqrt(1.0 / len(before) + blur * blur / len(after))

    def _is_better(
        self,
        before: Sequence[float],
        after: Sequence[float],
        positive: bool,
        *,
        slack: float = 0.0,
        blur: float = 1.0,
    ) -> bool:
        level = fmean(before)
        bound = self._thresholds.improved_z * self._error(before, after, blur)
        return level - fmean(after) > max(bound, slack, self._least_gain(level, positive))

    def _least_gain(self, level: float, positive: bool) -> float:
        return (self._thresholds.least_gain if positive else RESOLUTION) * abs(level)

    def _can_tell(self, before: Sequence[float], after: Sequence[float]) -> bool:
        """Whether a decisive fall would have shown: the gain is small at its upper bound, too."""
        level = fmean(before)
        most = level - fmean(after) + 2.0 * self._error(before, after)
        return most < self._thresholds.telling_gain * level

    def _is_falling(self, positive: bool) -> bool:
        """Spearman's rank correlation with time: as sharp as a line fit, but no outlier counts."""
        points = self.points[int(self._thresholds.fallen_share * len(self.points)) :]
        count = len(points)
        third = count // 3
        if not third:
            return False
        gain = fmean(points[:third]) - fmean(points[-third:])
        if gain <= self._least_gain(fmean(points[:third]), positive):
            return False
        middle = 0.5 * (count - 1)
        # Equal points keep their order, which counts as a rise and so never as a fall.
        order = sorted(range(count), key=points.__getitem__)
        together = sum((rank - middle) * (time - middle) for rank, time in enumerate(order))
        correlation = together / (count * (count * count - 1) / 12.0)
        return -correlation * math.sqrt(count - 1) > self._thresholds.improved_z
