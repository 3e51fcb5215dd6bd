"""Multiply the schedule's own learning rate for a while, unseen by the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard._validation import check_number


@dataclass(frozen=True)
class LearningRateBackoff:
    """Cut the effective learning rate on instability and recover it step by step.

    Args:
        factor: What one cut multiplies the rate by. Default 0.5.
        min_scale: The rate is never cut below this share of the schedule's. Default 1/64.
        cooldown_steps: Steps to wait after a cut before the next one. Default 25: a cut needs
            time to show, and repeated cuts on one cause would overshoot.
        recovery_steps: Healthy steps after which a cut is half undone (multiplied by
            ``factor ** -0.5``). Default 50.
        max_leap: How far beyond its highest value so far the schedule's own rate may rise in one
            step. One that rises further is followed by 5% a step, as a warm-up would have led to
            it; ``inf`` follows at once. Default 8: no schedule does so after its first ten steps,
            and a slip by three orders of magnitude, undone 10 steps later, has then raised the rate
            by 1.6.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.

    Example:
        >>> LearningRateBackoff(factor=2.0)
        Traceback (most recent call last):
        ...
        ValueError: factor must be a number > 0 and < 1, got 2.0
    """

    factor: float = 0.5
    min_scale: float = 1 / 64
    cooldown_steps: int = 25
    recovery_steps: int = 50
    max_leap: float = 8.0

    def __post_init__(self) -> None:
        check_number("factor", self.factor, above=0.0, below=1.0)
        check_number("min_scale", self.min_scale, above=0.0, at_most=1.0)
        check_number("cooldown_steps", self.cooldown_steps, at_least=0, integer=True)
        check_number("recovery_steps", self.recovery_steps, at_least=1, integer=True)
        check_number("max_leap", self.max_leap, above=1.0)


class LearningRateScale:
    """The factor on the learning rate that follows from what happened so far."""

    def __init__(self, settings: LearningRateBackoff) -> None:
        self.settings = settings
        self.scale = 1.0
        self._since_cut = settings.cooldown_steps
        self._healthy = 0

    @property
    def settled(self) -> bool:
        """Whether the last cut had time to show."""
        return self._since_cut >= self.settings.cooldown_steps

    def cut(self, *, at_once: bool = False) -> bool:
        """Cut once, if the last cut had time to show and the floor is not reached.

        Args:
            at_once: Do not wait for the last cut to show. Default ``False``.
        """
        self._healthy = 0
        if not (at_once or self.settled) or self.scale <= self.settings.min_scale:
            return False
        self.scale = max(self.scale * self.settings.factor, self.settings.min_scale)
        self._since_cut = 0
        return True

    def advance(self, healthy: bool) -> bool:
        """Account for one step; returns whether the scale recovered by one notch."""
        self._since_cut += 1
        self._healthy = self._healthy + 1 if healthy else 0
        if self.scale >= 1.0 or self._healthy < self.settings.recovery_steps:
            return False
        self._healthy = 0
        self.scale = min(1.0, self.scale * self.settings.factor**-0.5)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {"scale": self.scale, "since_cut": self._since_cut, "healthy": self._healthy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.scale = float(state["scale"])
        self._since_cut = int(state["since_cut"])
        self._healthy = int(state["healthy"])


class ScaledLearningRate:
    """Scale the learning rate of every parameter group for one step, then put it back.

    A scheduler reads and writes ``group["lr"]`` between steps only, so it never sees the scale.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scaled = ScaledLearningRate(optimizer)
        >>> scaled.apply(0.5); optimizer.param_groups[0]["lr"]
        0.05
        >>> scaled.restore(); optimizer.param_groups[0]["lr"]
        0.1
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._saved: list[float | Tensor | None] | None = None

    def apply(self, scale: float) -> None:
        """Multiply the learning rates by ``scale`` until :meth:`restore`."""
        self.restore()
        if scale != 1.0:
            scaled: set[int] = set()
            groups = self._optimizer.param_groups
            self._saved = [self._multiply(group, scale, scaled) for group in groups]

    @staticmethod
    def _multiply(group: dict[str, Any], scale: float, scaled: set[int]) -> float | Tensor | None:
        """Scale one group's rate; returns what it was."""
        rate = group.get("lr")
        if isinstance(rate, Tensor):
            if id(rate) in scaled:  # torch gives one tensor to every group that names no rate
                return None
            scaled.add(id(rate))
            saved = rate.clone()
            rate.mul_(scale)  # in place: a captured graph or a compiled step holds this tensor
            return saved
        if rate is not None:
            group["lr"] = rate * scale
        return rate

    def restore(self) -> None:
        """Put back what :meth:`apply` found."""
        saved, self._saved = self._saved, None
        for group, rate in zip(self._optimizer.param_groups, saved or (), strict=False):
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            elif rate is not None:
                group["lr"] = rate
