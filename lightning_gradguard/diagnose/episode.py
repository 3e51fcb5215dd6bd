"""When to speak: once as a finding opens, again only if it turns more severe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gradguard.diagnose.findings import Severity


class Episode:
    """One stretch of trouble, from its first symptom until it has been gone for a while.

    Args:
        heal_steps: Steps without the symptom that end the episode.
    """

    __slots__ = ("_calm", "_severity", "heal_steps")

    _calm: int
    _severity: int | None

    def __init__(self, heal_steps: int) -> None:
        self.heal_steps = heal_steps
        self.reset()

    @property
    def open(self) -> bool:
        """Whether something was reported that has not healed."""
        return self._severity is not None

    def report(self, severity: Severity) -> bool:
        """Takes in a step with the symptom; returns whether it is worth saying."""
        self._calm = 0
        if self._severity is not None and severity <= self._severity:
            return False
        self._severity = int(severity)
        return True

    def calm(self, steps: int = 1) -> None:
        """Takes in `steps` steps without the symptom."""
        if self._severity is None:
            return
        self._calm += steps
        if self._calm >= self.heal_steps:
            self.reset()

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers."""
        return {"severity": self._severity, "calm": self._calm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self._severity = state["severity"]
        self._calm = state["calm"]

    def reset(self) -> None:
        """Ends the episode."""
        self._severity = None
        self._calm = 0
