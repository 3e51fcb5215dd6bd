"""When to keep a copy of the weights, and when to go back to it.

Plain values in and out; the copies themselves are in :mod:`lightning_gradguard.respond.snapshots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gradguard._validation import check_number
from lightning_gradguard.diagnose import Finding, Pathology, Severity

# The weights are looked at on the first of a row of bad steps, and on every 8th after it: each look
# costs a pass over them, and what breaks them does not go away.
_LOOK_EVERY = 8

# While one of these is open, the weights of the moment may hold the beginning of the trouble. One
# that says that nothing is learned does not count: it may last for the whole run.
_DAMAGING = frozenset(
    {Pathology.NON_FINITE, Pathology.EXPLODING, Pathology.DIVERGING, Pathology.LOSS_SPIKE}
)


@dataclass(frozen=True)
class WeightRollback:
    """Keep copies of healthy weights in host memory, and go back to them when a run is lost.

    A copy holds the optimizer's parameters, its state, and the buffers of the model. Two are kept,
    and the older one is put back: the newer one may hold the beginning of the trouble. Learning
    rates and all other settings of the optimizer stay as they are, so the schedule goes on.

    Copies are not part of a checkpoint: a resumed run makes its first one on its first healthy
    step, and before that has nothing to go back to.

    Args:
        every_n_steps: Steps between two copies. Default 50: a divergence is known for sure after
            32 to 64 steps, and the older copy is 50 to 100 steps old.
        max_rollbacks: Times that weights are put back in a run. After that, what would have been
            answered by one more asks the run to stop, or has the learning rate cut. Default 3: a
            fault that comes back three times will come back again.
        max_bytes: Host memory that the two copies may take together. A run that needs more goes
            without them. Default 2 GiB.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If an argument is out of range.

    Example:
        >>> WeightRollback(every_n_steps=100).max_rollbacks
        3
        >>> WeightRollback(every_n_steps=0)
        Traceback (most recent call last):
        ...
        ValueError: every_n_steps must be an integer >= 1, got 0
    """

    every_n_steps: int = 50
    max_rollbacks: int = 3
    max_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        check_number("every_n_steps", self.every_n_steps, at_least=1, integer=True)
        check_number("max_rollbacks", self.max_rollbacks, at_least=1, integer=True)
        check_number("max_bytes", self.max_bytes, at_least=1, integer=True)


class RollbackBudget:
    """Counts rollbacks, and knows whether the last steps were healthy.

    Attributes:
        used: Rollbacks so far.
        stopped: Whether the run was asked to stop.
    """

    def __init__(self, settings: WeightRollback) -> None:
        self.settings = settings
        self.used = 0
        self.stopped = False
        self._healthy = True
        self._in_a_row = 0
        self._resumed_at = 0

    @property
    def spent(self) -> bool:
        """Whether there is no rollback left."""
        return self.stopped or self.used >= self.settings.max_rollbacks

    def looks(self, *, good: bool) -> bool:
        """Take in a step; returns whether the weights are to be looked at after it.

        Args:
            good: Whether it was taken, and its loss and its gradient were finite.
        """
        self._in_a_row = 0 if good else self._in_a_row + 1
        return self._in_a_row % _LOOK_EVERY == 1

    def follow(self, *, healthy: bool) -> None:
        """Take in whether a step was taken and its loss was finite."""
        self._healthy = healthy

    def copy_due(self, step: int, newest: int | None) -> bool:
        """Whether the weights are to be copied before the update of ``step``.

        The very first ones always are: no update has done them harm.

        Args:
            step: The coming step.
            newest: Step of the newest copy; ``None`` if there is none.
        """
        if newest is None:
            return step == 0 or self._healthy
        return self._healthy and step - newest >= self.settings.every_n_steps

    def is_under_way(self, step: int) -> bool:
        """Whether ``step`` was on its way already when weights were put back last."""
        return step < self._resumed_at

    def resume_at(self, step: int) -> None:
        """Weights were put back before the update of ``step``."""
        self._resumed_at = step
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "used": self.used,
            "stopped": self.stopped,
            "healthy": self._healthy,
            "in_a_row": self._in_a_row,
            "resumed_at": self._resumed_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; a run that was stopped has all its rollbacks again."""
        self.used = 0 if state["stopped"] else int(state["used"])
        self.stopped = False
        self._healthy = bool(state["healthy"])
        self._in_a_row = int(state["in_a_row"])
        self._resumed_at = int(state["resumed_at"])


def do_damage(findings: Sequence[Finding]) -> bool:
    """Whether one of these open findings says that the weights are being damaged.

    Example:
        >>> spike = Finding(Pathology.LOSS_SPIKE, Severity.WARNING, "loss", 3, {}, "")
        >>> stuck = Finding(Pathology.STAGNATING, Severity.WARNING, "loss", 3, {}, "")
        >>> do_damage([spike]), do_damage([stuck])
        (True, False)
    """
    return any(
        not f.local and f.severity >= Severity.WARNING and f.pathology in _DAMAGING
        for f in findings
    )


def ask_to_go_back(findings: Sequence[Finding]) -> str:
    """Why these new findings ask for earlier weights, in words; empty if they do not.

    Example:
        >>> ask_to_go_back([Finding(Pathology.DIVERGING, Severity.WARNING, "loss", 3, {}, "")])
        'the run is diverging'
    """
    for finding in findings:
        if finding.pathology is Pathology.DIVERGING and finding.severity >= Severity.WARNING:
            return "the run is diverging"
        if finding.pathology is Pathology.EXPLODING and finding.severity >= Severity.CRITICAL:
            return "its gradient is exploding"
    return ""
