"""What the guard did, as a value that can be recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class ActionKind(str, Enum):
    """The rungs of the ladder that are worth a line of their own.

    Clips and caps happen on many steps and are counted in the history instead.
    """

    SKIP = "skip"
    TIGHTEN = "tighten"
    BACK_OFF = "back_off"
    RECOVER = "recover"
    ROLL_BACK = "roll_back"
    BOOST = "boost"
    STOP = "stop"


@dataclass(frozen=True)
class Action:
    """One thing the guard did.

    Args:
        kind: Which rung of the ladder.
        step: Optimizer step at which it acted.
        message: One plain sentence: what, and why.
        numbers: The named numbers it rests on.
    """

    kind: ActionKind
    step: int
    message: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "kind": self.kind.value,
            "step": self.step,
            "message": self.message,
            "numbers": dict(self.numbers),
        }
