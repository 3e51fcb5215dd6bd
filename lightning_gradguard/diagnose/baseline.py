"""Running robust statistics: what is usual, and how far from it a value lies."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning_gradguard._validation import check_number

# Makes the median absolute deviation of normal values estimate their standard deviation.
MAD_TO_SCALE = 1.4826
# A loss comes from float32: differences below this share of it are rounding, not noise.
RESOLUTION = 1e-6


def log_norm(norm: float) -> float:
    """Returns log(norm); -inf for a zero norm, +inf for a norm that is NaN or infinite.

    Example:
        >>> log_norm(1.0), log_norm(0.0), log_norm(float("nan"))
        (0.0, -inf, inf)
    """
    if 0.0 < norm < math.inf:
        return math.log(norm)
    return -math.inf if norm == 0.0 else math.inf


class RobustBaseline:
    """Median and MAD of the last `window` values, with outliers capped and new levels accepted.

    Feed it logarithms of norms (`log_norm`), or raw losses with a `relative_floor`. Three rules
    keep it usable as a reference:

    * Non-finite values never enter. A zero norm, whose logarithm is -inf, has no scale to teach.
    * An outlier (beyond `outlier_z`) enters as the bound it crossed, so one bad batch moves the
      median by at most one rank.
    * After `accept_after` consecutive outliers on one side the window restarts from these raw
      values: a sustained new level is the new baseline, after a bounded number of steps.

    Args:
        window: Values kept.
        warmup: Values needed before `ready`.
        accept_after: Consecutive outliers on one side that become the new level.
        outlier_z: Robust z beyond which a value is an outlier.
        scale_floor: Least scale, in the unit of the values. 0.05 suits log-norms.
        relative_floor: Least scale as a share of a positive median. 0 for log-norms; a positive
            loss has a natural zero, a negative one has none and gets no such floor.

    Raises:
        TypeError: If an argument is not a number, or not an integer where it counts values.
        ValueError: If an argument is out of range.

    Example:
        >>> baseline = RobustBaseline(window=8, warmup=4, accept_after=4)
        >>> [baseline.update(v) for v in (1.0, 1.1, 0.9, 1.0)]
        [0.0, 0.0, 0.0, 0.0]
        >>> baseline.ready, baseline.median, round(baseline.update(9.0), 1)
        (True, 1.0, 107.9)
    """

    __slots__ = (
        "_order",
        "_run",
        "_side",
        "_sorted",
        "accept_after",
        "median",
        "outlier_z",
        "ready",
        "relative_floor",
        "scale",
        "scale_floor",
        "warmup",
        "window",
    )

    _order: deque[float]
    _run: list[float]
    _side: int
    _sorted: list[float]
    ready: bool
    median: float
    scale: float

    def __init__(
        self,
        window: int = 128,
        warmup: int = 16,
        accept_after: int = 16,
        outlier_z: float = 6.0,
        scale_floor: float = 0.05,
        relative_floor: float = 0.0,
    ) -> None:
        check_number("window", window, at_least=2, integer=True)
        check_number("warmup", warmup, at_least=2, at_most=window, integer=True)
        check_number("accept_after", accept_after, at_least=2, at_most=window, integer=True)
        check_number("outlier_z", outlier_z, above=0.0, below=math.inf)
        check_number("scale_floor", scale_floor, at_least=0.0, below=math.inf)
        check_number("relative_floor", relative_floor, at_least=0.0, below=math.inf)
        self.window = window
        self.warmup = warmup
        self.accept_after = accept_after
        self.outlier_z = outlier_z
        self.scale_floor = scale_floor
        self.relative_floor = relative_floor
        self.reset()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def highest(self) -> float:
        """The largest value in the window, after capping; NaN while empty."""
        return self._sorted[-1] if self._sorted else math.nan

    def threshold(self, z: float) -> float:
        """Returns the value whose robust z is `z`; +inf while not ready."""
        return self.median + z * self.scale if self.ready else math.inf

    def score(self, value: float) -> float:
        """Returns the robust z of a finite `value` without entering it; 0 while not ready."""
        if not self.ready:
            return 0.0
        distance = value - self.median
        if self.scale > 0.0:
            return distance / self.scale
        return math.copysign(math.inf, distance) if distance else 0.0

    def update(self, value: float) -> float:
        """Enters a value and returns its robust z against the values before it.

        Returns:
            The z-score; 0 while not ready. For a value that is not finite, and so does not enter,
            -inf if it is -inf (the logarithm of a zero norm) and +inf otherwise.
        """
        if not -math.inf < value < math.inf:
            return -math.inf if value == -math.inf else math.inf
        if not self.ready:
            self._enter(value)
            return 0.0
        z = self.score(value)
        if -self.outlier_z <= z <= self.outlier_z:
            if self._run:
                self._run = []
            self._enter(value)
        else:
            self._enter_outlier(value, 1 if z > 0 else -1)
        return z

    def state_dict(self) -> dict[str, Any]:
        """Returns the values in order of arrival, and the present run of outliers."""
        return {"values": list(self._order), "run": list(self._run), "side": self._side}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; what follows is bit-identical, as all else is a function of it.

        Raises:
            ValueError: If the state holds more values than the window.
        """
        values = [float(v) for v in state["values"]]
        if len(values) > self.window:
            raise ValueError(
                f"state holds {len(values)} values, the window allows at most {self.window}"
            )
        self._run = [float(v) for v in state["run"]]
        self._side = int(state["side"])
        self._restart(values)

    def relearn(self) -> None:
        """Forgets all values, so that it judges none until `warmup` new ones are in.

        For a run that has changed course: the levels before are no measure of what comes.
        """
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._run = []
        self._side = 0
        self._restart([])

    def _restart(self, values: list[float]) -> None:
        self._order = deque(values)
        self._sorted = sorted(values)
        self._refresh()

    def _enter_outlier(self, value: float, side: int) -> None:
        if side != self._side:
            self._side = side
            self._run = []
        self._run.append(value)
        if len(self._run) >= self.accept_after:
            level, self._run = self._run, []
            self._restart(level)
        else:
            self._enter(self.median + side * self.outlier_z * self.scale)

    def _enter(self, value: float) -> None:
        order, ranked = self._order, self._sorted
        if len(order) == self.window:
            del ranked[bisect_left(ranked, order.popleft())]
        order.append(value)
        insort(ranked, value)
        self._refresh()

    def _refresh(self) -> None:
        """Median and scale from the sorted window, in O(log window)."""
        ranked = self._sorted
        n = len(ranked)
        self.ready = n >= self.warmup
        if n == 0:
            self.median = self.scale = math.nan
            return
        half = n // 2
        median = ranked[half] if n % 2 else 0.5 * ranked[half - 1] + 0.5 * ranked[half]
        # The half + 1 values nearest to the median are neighbors in sorted order: find the first.
        low, high = 0, n - half - 1
        while low < high:
            middle = (low + high) // 2
            if ranked[middle + half + 1] - median < median - ranked[middle]:
                low = middle + 1
            else:
                high = middle
        left, right = median - ranked[low], ranked[low + half] - median
        mad = max(left, right)
        if n % 2 == 0:
            # An even count has two middle deviations; the other one is the second largest here.
            if left > right:
                left = median - ranked[low + 1]
            else:
                right = ranked[low + half - 1] - median
            mad = 0.5 * mad + 0.5 * max(left, right)
        scale = MAD_TO_SCALE * mad
        floor = self.scale_floor
        if self.relative_floor:
            floor += max(self.relative_floor * median, RESOLUTION * abs(median))
        self.median = median
        self.scale = max(scale, floor)
