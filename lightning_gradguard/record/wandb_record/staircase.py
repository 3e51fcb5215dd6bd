"""Lines that show when something happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Staircase:
    """Levels that stay until they jump, each at one step.

    A chart joins its points: a count of 1 at step 10 and of 2 at step 500 would be a slope. The
    level before the jump, logged at the same step, makes it upright. It also keeps a single jump
    from being the only point of its line, which W&B draws as a bar without a step.

    Args:
        known: Gives the level that a run had before it was resumed, or ``None``.

    Example:
        >>> staircase = Staircase()
        >>> staircase.jump({"skips": 1.0})
        {'skips': 0.0}
        >>> staircase.jump({"skips": 1.0}), staircase.levels
        ({}, {'skips': 1.0})
    """

    def __init__(self, known: Callable[[str], Any] = lambda _: None) -> None:
        self._known = known
        self.levels: dict[str, float] = {}

    def level(self, key: str) -> float:
        """The level as it is: 0 for one that has never been anything else."""
        if key not in self.levels:
            return _last_of(self._known(key))
        return self.levels[key]

    def jump(self, levels: Mapping[str, float]) -> dict[str, float]:
        """Take over levels; returns what those that change were before."""
        before = {key: self.level(key) for key in levels}
        self.levels |= levels
        return {key: level for key, level in before.items() if level != levels[key]}


def _last_of(summary: Any) -> float:
    """The last value, of a summary that may keep it beside the largest."""
    if hasattr(summary, "get"):
        summary = summary.get("last", summary.get("max"))
    return float(summary) if isinstance(summary, (int, float)) else 0.0
