"""A run as it was found at some time, and how far it has come."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from datetime import datetime

from lightning_gradguard.cli.words import duration, number, seconds_between
from lightning_gradguard.record.run_history import RunHistory

# A view of the present: long enough for the pauses of validation to count, and no longer.
_SPEED_SECONDS = 60.0


@dataclass(frozen=True)
class Seen:
    """A run as it was found.

    Attributes:
        run: With its last steps.
        now: When that was, with its zone.
        speed: Steps per second; NaN if not known.
    """

    run: RunHistory
    now: datetime
    speed: float = math.nan

    @property
    def steps(self) -> int:
        """Optimizer steps so far, of the optimizer that took the most."""
        return steps_taken(self.run)

    @property
    def ended(self) -> bool:
        """Whether the run goes on no more."""
        return self.run.info.status != "running"

    @property
    def age(self) -> float:
        """Seconds since the run was heard of; NaN if not known."""
        return max(seconds_between(self.run.info.updated, self.now), 0.0)

    @property
    def protecting(self) -> bool:
        """Whether the guard may respond."""
        return any(part.get("mode") != "observe" for part in self.run.info.optimizers)

    @property
    def speed_words(self) -> str:
        """Speed, and while the run goes on the time that is left; empty if not known."""
        if not math.isfinite(self.speed) or self.speed <= 0.0:
            return ""
        words = f"{number(self.speed)} steps/s"
        planned = self.run.info.planned_steps
        if not self.ended and planned and planned > self.steps:
            words += f", {duration((planned - self.steps) / self.speed)} left"
        return words


def steps_taken(run: RunHistory) -> int:
    """Optimizer steps so far, of the optimizer that took the most."""
    last = [part.steps["step"][-1] for part in run.optimizers if len(part.steps["step"])]
    return int(max(last)) + 1 if last else 0


class SpeedMeter:
    """Steps per second, over the last minute that was watched.

    Example:
        >>> meter = SpeedMeter()
        >>> meter.of(100.0, 500), meter.of(102.0, 530)
        (nan, 15.0)
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, time: float, steps: int) -> float:
        """Speed as of a time at which so many steps were taken; NaN at first.

        Args:
            time: In seconds from any start, as the run tells it.
            steps: Since the start of the run.
        """
        if not self._seen or time > self._seen[-1][0]:
            self._seen.append((time, steps))
        while len(self._seen) > 2 and time - self._seen[0][0] > _SPEED_SECONDS:
            self._seen.popleft()
        (start, before), (end, after) = self._seen[0], self._seen[-1]
        return (after - before) / (end - start) if end > start else math.nan
