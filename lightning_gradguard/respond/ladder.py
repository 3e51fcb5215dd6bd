"""The ladder: which bounds the next step is held to, given everything up to now.

Plain values in and out. Every rank that is fed the same values decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gradguard.diagnose import Finding, Pathology, RobustBaseline, Severity
from lightning_gradguard.respond.actions import Action, ActionKind
from lightning_gradguard.respond.clipping import AdaptiveClip
from lightning_gradguard.respond.learning_rate import LearningRateBackoff, LearningRateScale
from lightning_gradguard.respond.skipping import SkipBadSteps, SkipBudget
from lightning_gradguard.respond.update_cap import RatioSchedule, UpdateCap

# Findings upon which the learning rate is cut: the run gets worse, and the cap did not stop it.
_AS_SAID = {
    Pathology.DIVERGING: "diverging",
    Pathology.EXPLODING: "exploding",
    Pathology.LOSS_SPIKE: "stuck after a spike of its loss",
}


@dataclass(frozen=True)
class StepPlan:
    """The bounds for one step. The defaults bound nothing.

    Args:
        clip_threshold: Total gradient norm to clip to.
        skip_limit: Gradient norm beyond which the step is dropped; a norm that is not finite is
            dropped whenever ``may_skip``.
        may_skip: Whether steps are dropped at all.
        max_ratio: Cap on each tensor's relative update.
        lr_scale: Factor on the learning rate.
    """

    clip_threshold: float = math.inf
    skip_limit: float = math.inf
    may_skip: bool = False
    max_ratio: float = math.inf
    lr_scale: float = 1.0

    def skips(self, total_norm: float) -> bool:
        """Whether a step with this gradient norm is dropped."""
        return self.may_skip and not (math.isfinite(total_norm) and total_norm <= self.skip_limit)


@dataclass(frozen=True)
class LadderSettings:
    """The rungs that are in use; ``None`` leaves one out."""

    clip: AdaptiveClip | None = AdaptiveClip()
    cap: UpdateCap | None = UpdateCap()
    skip: SkipBadSteps | None = SkipBadSteps()
    backoff: LearningRateBackoff | None = LearningRateBackoff()


class Ladder:
    """Bounds of the next step from norms, losses, findings and what was done so far."""

    def __init__(self, settings: LadderSettings) -> None:
        self.settings = settings
        self.baseline = RobustBaseline()
        self.budget = SkipBudget(settings.skip) if settings.skip else None
        self.schedule = RatioSchedule(settings.cap) if settings.cap else None
        self.rate = LearningRateScale(settings.backoff) if settings.backoff else None
        self.should_stop = False

    @property
    def median_norm(self) -> float | None:
        """The run's own median gradient norm, or ``None`` while it is not known."""
        return math.exp(self.baseline.median) if self.baseline.ready else None

    def plan(self) -> StepPlan:
        """The bounds of the next step."""
        clip, skip, median = self.settings.clip, self.settings.skip, self.median_norm
        return StepPlan(
            clip_threshold=clip.threshold(median) if clip else math.inf,
            skip_limit=skip.limit(median) if skip else math.inf,
            may_skip=skip is not None,
            max_ratio=self.schedule.ratio if self.schedule else math.inf,
            lr_scale=self.rate.scale if self.rate else 1.0,
        )

    def observe(
        self,
        step: int,
        *,
        total_norm: float,
        loss: float | None,
        skipped: bool,
        large_share: float,
        findings: Sequence[Finding],
    ) -> list[Action]:
        """Take in one step; returns what changes because of it.

        Args:
            step: Number of the step.
            total_norm: Gradient norm before clipping.
            loss: Loss of the step, if known.
            skipped: Whether it was dropped.
            large_share: Share of tensors whose update would have been large, in [0, 1].
            findings: Findings that opened at this step.
        """
        actions: list[Action] = []
        if math.isfinite(total_norm) and total_norm > 0.0:
            self.baseline.update(math.log(total_norm))
        if self.budget is not None:
            actions += self._account_for_skip(self.budget, step, total_norm, skipped)
        if self.schedule is not None:
            actions += self._follow_loss(self.schedule, step, loss, large_share)
        if self.rate is not None:
            actions += self._scale_rate(self.rate, step, skipped, findings)
        return actions

    def _account_for_skip(
        self, budget: SkipBudget, step: int, total_norm: float, skipped: bool
    ) -> list[Action]:
        budget.record(skipped)
        if not skipped:
            return []
        median = self.median_norm
        size = f"{total_norm:.3g}"
        if median is not None and math.isfinite(total_norm):
            size += f", {total_norm / median:.3g} times its median"
        message = (
            f"Step {step} skipped, because the gradient norm was {size}; "
            "weights and optimizer state are untouched."
        )
        actions = [Action(ActionKind.SKIP, step, message, {"total_norm": total_norm})]
        if budget.spent and not self.should_stop:
            self.should_stop = True
            message = (
                f"Stopping at step {step}: {budget.consecutive} steps in a row had to be skipped, "
                "so the weights or the data themselves are bad."
            )
            numbers = {"consecutive": float(budget.consecutive)}
            actions.append(Action(ActionKind.STOP, step, message, numbers))
        return actions

    @staticmethod
    def _follow_loss(
        schedule: RatioSchedule, step: int, loss: float | None, large_share: float
    ) -> list[Action]:
        change = schedule.advance(loss, large_share)
        if change >= 1.0:
            return []
        message = (
            f"Cap on updates tightened to {schedule.ratio:.2%} of each tensor's norm per step, "
            "because updates are large and the loss does not improve."
        )
        return [Action(ActionKind.TIGHTEN, step, message, {"max_ratio": schedule.ratio})]

    @staticmethod
    def _scale_rate(
        rate: LearningRateScale, step: int, skipped: bool, findings: Sequence[Finding]
    ) -> list[Action]:
        causes = [f for f in findings if f.severity >= Severity.WARNING and f.pathology in _AS_SAID]
        if causes and rate.cut():
            message = (
                f"Learning rate cut to {rate.scale:.3g} of its schedule, because the run is "
                f"{_AS_SAID[causes[0].pathology]}."
            )
            kind = ActionKind.BACK_OFF
        elif rate.advance(healthy=not skipped and not causes):
            message = f"Learning rate recovered to {rate.scale:.3g} of its schedule."
            kind = ActionKind.RECOVER
        else:
            return []
        return [Action(kind, step, message, {"lr_scale": rate.scale})]

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "baseline": self.baseline.state_dict(),
            **{name: part.state_dict() for name, part in self._parts()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; a rung that was off when it was saved starts afresh.

        A run that was stopped and is resumed all the same has its budget of skips again.
        """
        self.baseline.load_state_dict(state["baseline"])
        for name, part in self._parts():
            if name in state:
                part.load_state_dict(state[name])
        if self.budget is not None and self.budget.spent:
            self.budget.consecutive = 0

    def _parts(self) -> list[tuple[str, SkipBudget | RatioSchedule | LearningRateScale]]:
        parts = {"budget": self.budget, "schedule": self.schedule, "rate": self.rate}
        return [(name, part) for name, part in parts.items() if part is not None]
