"""The ladder: which bounds the next step is held to, given everything up to now.

Plain values in and out. Every rank that is fed the same values decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_gradguard.diagnose import Finding, Pathology, RobustBaseline, Severity
from lightning_gradguard.respond import announcements
from lightning_gradguard.respond.actions import Action
from lightning_gradguard.respond.clip_thresholds import (
    UNBOUNDED,
    ClipBounds,
    ClipSegments,
    ClipThresholds,
    make_thresholds,
)
from lightning_gradguard.respond.clipping import AdaptiveClip, ClipStrategy
from lightning_gradguard.respond.learning_rate import LearningRateBackoff, LearningRateScale
from lightning_gradguard.respond.rate_jumps import FollowedRate
from lightning_gradguard.respond.ratio_schedule import RatioSchedule
from lightning_gradguard.respond.rollback import RollbackBudget, WeightRollback, ask_to_go_back
from lightning_gradguard.respond.skipping import SkipBadSteps, SkipBudget
from lightning_gradguard.respond.update_cap import UpdateCap

# Findings upon which the learning rate is cut: the run gets worse, and the cap did not stop it.
_AS_SAID = {
    Pathology.DIVERGING: "diverging",
    Pathology.EXPLODING: "exploding",
    Pathology.LOSS_SPIKE: "stuck after a spike of its loss",
}


_Rung: TypeAlias = (
    ClipThresholds | SkipBudget | RatioSchedule | LearningRateScale | FollowedRate | RollbackBudget
)


@dataclass(frozen=True)
class StepPlan:
    """The bounds for one step. The defaults bound nothing.

    Args:
        clip_threshold: Total gradient norm to clip to.
        clip_center: The larger the norm, the nearer to this it is clipped, see
            :func:`~lightning_gradguard.respond.clip_levels.clip_target`.
        clip_segments: What each segment is clipped to, where not the total norm decides.
        skip_limit: Gradient norm beyond which the step is dropped; a norm that is not finite is
            dropped whenever ``may_skip``.
        may_skip: Whether steps are dropped at all.
        max_ratio: Cap on each tensor's relative update.
        lr_scale: Factor on the learning rate.
    """

    clip_threshold: float = math.inf
    clip_center: float = -math.inf
    clip_segments: ClipBounds | None = None
    skip_limit: float = math.inf
    may_skip: bool = False
    max_ratio: float = math.inf
    lr_scale: float = 1.0

    @property
    def clip_limit(self) -> float:
        """The largest total norm that clipping lets through, as far as it is known beforehand."""
        return self.clip_threshold if self.clip_segments is None else self.clip_segments.limit

    def skips(self, total_norm: float) -> bool:
        """Whether a step with this gradient norm is dropped."""
        return self.may_skip and not (math.isfinite(total_norm) and total_norm <= self.skip_limit)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        segments = self.clip_segments
        return {**vars(self), "clip_segments": None if segments is None else segments.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepPlan:
        """The inverse of :meth:`to_dict`."""
        segments = values.get("clip_segments")
        bounds = None if segments is None else ClipBounds.from_dict(segments)
        return cls(**{**values, "clip_segments": bounds})


@dataclass(frozen=True)
class LadderSettings:
    """The rungs that are in use; ``None`` leaves one out."""

    clip: ClipStrategy | None = AdaptiveClip()
    cap: UpdateCap | None = UpdateCap(on_evidence=True)
    skip: SkipBadSteps | None = SkipBadSteps()
    backoff: LearningRateBackoff | None = LearningRateBackoff()
    rollback: WeightRollback | None = WeightRollback()


class Ladder:
    """Bounds of the next step from norms, losses, findings and what was done so far.

    Args:
        settings: The rungs that are in use.
        in_a_game: Whether other optimizers change what the loss is, so that a loss that rises is no
            evidence against a run that is trusted. Default ``False``.

    Attributes:
        should_stop: Whether there is nothing left to try.
        puts_back: Whether weights are to be put back to their copy after the step observed last.
    """

    def __init__(self, settings: LadderSettings, *, in_a_game: bool = False) -> None:
        self.settings = settings
        self._in_a_game = in_a_game
        self.baseline = RobustBaseline()
        self.clip = make_thresholds(settings.clip, self.baseline)
        self.budget = SkipBudget(settings.skip) if settings.skip else None
        self.schedule = _schedule(settings)
        self.rate = LearningRateScale(settings.backoff) if settings.backoff else None
        self.followed = FollowedRate(settings.backoff.max_leap) if settings.backoff else None
        self.rollback = RollbackBudget(settings.rollback) if settings.rollback else None
        self.should_stop = False
        self.puts_back = False

    @property
    def median_norm(self) -> float | None:
        """The run's own median gradient norm, or ``None`` while it is not known."""
        return math.exp(self.baseline.median) if self.baseline.ready else None

    def follow(self, step: int, rates: Sequence[float]) -> list[Action]:
        """Take in the learning rates of the coming step; returns what changes because of them.

        Args:
            step: The coming step.
            rates: As the schedule sets them, of each parameter group; NaN where not known.
        """
        if self.followed is None:
            return []
        before = self.followed.scale
        scale = self.followed.follow(rates)
        if scale == 1.0 or before < 1.0:
            return []
        return [announcements.followed(step, max(rates), scale, self.followed.steps_left)]

    def follow_parameters(self, segments: ClipSegments, *, compounding: bool) -> None:
        """Take in the parameters that are bounded from now on.

        Args:
            segments: Which of them are clipped together.
            compounding: Whether changes of some of them compound from timestep to timestep, so that
                there is nothing left of the run by the time the loss shows that they are too large.
        """
        if self.clip is not None:
            self.clip.follow(segments)
        if self.schedule is not None and compounding:
            self.schedule.stop_trusting()

    def lose_copies(self) -> None:
        """There are no weights to go back to any more, nor will there be."""
        if self.schedule is not None:
            self.schedule.lose_copies()

    def plan(self) -> StepPlan:
        """The bounds of the next step."""
        skip, median = self.settings.skip, self.median_norm
        total, segments = UNBOUNDED, None
        if self.clip is not None and self.clip.by_segment:
            segments = self.clip.bounds()
        elif self.clip is not None:
            total = self.clip.bounds()
        return StepPlan(
            clip_threshold=total.thresholds[0],
            clip_center=total.centers[0],
            clip_segments=segments,
            skip_limit=skip.limit(median) if skip else math.inf,
            may_skip=skip is not None,
            max_ratio=self.schedule.ratio if self.schedule else math.inf,
            lr_scale=(self.rate.scale if self.rate else 1.0)
            * (self.followed.scale if self.followed else 1.0)
            * (self.schedule.lr_scale if self.schedule else 1.0),
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
        weights_broken: bool = False,
        restorable: int | None = None,
        segment_norms: Sequence[float] = (),
    ) -> list[Action]:
        """Take in one step; returns what changes because of it.

        Args:
            step: Number of the step.
            total_norm: Gradient norm before clipping.
            loss: Loss of the step, if known.
            skipped: Whether it was dropped.
            large_share: Share of tensors whose update would have been large, in [0, 1].
            findings: Findings that opened at this step.
            weights_broken: Whether NaN or Inf was found in the weights.
            restorable: Step to which weights can be put back; ``None`` if to none.
            segment_norms: Norm of each segment that is clipped by itself, before clipping.
        """
        actions: list[Action] = []
        self.puts_back = False
        under_way = self.rollback is not None and self.rollback.is_under_way(step)
        if under_way:  # of weights that are gone
            findings, weights_broken = (), False
        if self.rollback is not None:
            finite = math.isfinite(total_norm) and (loss is None or math.isfinite(loss))
            self.rollback.follow(healthy=finite and not skipped)
        self._learn(total_norm, segment_norms)
        if self.budget is not None:
            actions += self._account_for_skip(self.budget, step, total_norm, skipped)
            if under_way:
                self.budget.consecutive = 0
        lost = self._why_lost(weights_broken=weights_broken)
        back = self._go_back(step, lost or ask_to_go_back(findings), restorable)
        if back is not None:
            return [*actions, back]
        if lost:
            actions += self._stop(step, lost, restorable, weights_broken=weights_broken)
        if self.schedule is not None:
            actions += self._follow_loss(self.schedule, step, loss, large_share, restorable)
        if self.rate is not None:
            actions += self._scale_rate(self.rate, step, skipped, findings)
        return actions

    def _learn(self, total_norm: float, segment_norms: Sequence[float]) -> None:
        if math.isfinite(total_norm) and total_norm > 0.0:
            self.baseline.update(math.log(total_norm))
        if self.clip is not None:
            self.clip.observe(segment_norms if self.clip.by_segment else (total_norm,))

    def _account_for_skip(
        self, budget: SkipBudget, step: int, total_norm: float, skipped: bool
    ) -> list[Action]:
        budget.record(skipped)
        if not skipped:
            return []
        return [announcements.skipped(step, total_norm, self.median_norm)]

    def _why_lost(self, *, weights_broken: bool) -> str:
        """Why the run cannot go on as it is, in words; empty if it can."""
        if weights_broken:
            return "the weights are broken: not finite, or out of all proportion to their last copy"
        if self.budget is not None and self.budget.spent:
            return (
                f"{self.budget.consecutive} steps in a row had to be skipped, "
                "so the weights or the data themselves are bad"
            )
        return ""

    def _go_back(self, step: int, reason: str, restorable: int | None) -> Action | None:
        """Put the weights back, as long as there is a copy and a rollback left."""
        rollback = self.rollback
        if not reason or restorable is None or rollback is None or rollback.spent:
            return None
        self.puts_back = True
        rollback.used += 1
        if self.budget is not None:
            self.budget.consecutive = 0
        if self.schedule is not None:
            self.schedule.retreat()
        also, numbers = "", {"rollbacks": float(rollback.used)}
        if self.rate is not None and self.rate.cut(at_once=True):
            also = f"learning rate cut to {self.rate.scale:.3g} of its schedule"
            numbers["lr_scale"] = self.rate.scale
        return announcements.put_back(step, restorable, reason, also, numbers)

    def _stop(
        self, step: int, reason: str, restorable: int | None, *, weights_broken: bool
    ) -> list[Action]:
        """Ask the run to stop, once, and never leave it with weights that are not finite."""
        self.puts_back = restorable is not None and (weights_broken or not self.should_stop)
        if self.should_stop:
            return []
        self.should_stop = True
        numbers = {"consecutive": float(self.budget.consecutive)} if self.budget else {}
        used = 0
        if self.rollback is not None:
            self.rollback.stopped, used = True, self.rollback.used
            numbers["rollbacks"] = float(used)
        return [announcements.stopped(step, reason, restorable, used, numbers)]

    def copy_due(self, step: int, newest: int | None) -> bool:
        """Whether the weights are to be copied before the update of ``step``.

        Args:
            step: The coming step.
            newest: Step of the newest copy; ``None`` if there is none.
        """
        if self.rollback is None or not self.rollback.copy_due(step, newest):
            return False
        return newest is None or self.rate is None or self.rate.settled

    def _follow_loss(
        self,
        schedule: RatioSchedule,
        step: int,
        loss: float | None,
        large_share: float,
        restorable: int | None,
    ) -> list[Action]:
        if self._in_a_game and schedule.trusting:
            return []
        if step == 0 and restorable is None:
            schedule.stop_trusting()
        change = schedule.advance(loss, large_share)
        if schedule.asks_back:
            return [self._begin_to_bind(schedule, step, restorable)]
        if change == 1.0 or (change > 1.0 and not schedule.trusting):
            return []
        if change > 1.0:
            return [announcements.recovered(step, schedule.lr_scale)]
        why = "updates are large and the loss gets worse"
        if schedule.trial is not None:
            why = "updates are large and the loss does not change; smaller ones are tried"
        if schedule.trusting:
            return [announcements.cut(step, schedule.lr_scale, why)]
        return [announcements.tightened(step, schedule.ratio, why)]

    def _begin_to_bind(self, schedule: RatioSchedule, step: int, restorable: int | None) -> Action:
        """The cap does not trust the run any more: undo what that led to, as far as possible."""
        why = "the loss has risen under large updates"
        if restorable is None:
            return announcements.tightened(step, schedule.ratio, why)
        self.puts_back = True
        if self.budget is not None:
            self.budget.consecutive = 0
        also = f"updates capped at {schedule.ratio:.2%} of each tensor's norm"
        return announcements.put_back(step, restorable, why, also, {"max_ratio": schedule.ratio})

    @staticmethod
    def _scale_rate(
        rate: LearningRateScale, step: int, skipped: bool, findings: Sequence[Finding]
    ) -> list[Action]:
        causes = [f for f in findings if f.severity >= Severity.WARNING and f.pathology in _AS_SAID]
        if causes and rate.cut():
            why = f"the run is {_AS_SAID[causes[0].pathology]}"
            return [announcements.cut(step, rate.scale, why)]
        if rate.advance(healthy=not skipped and not causes):
            return [announcements.recovered(step, rate.scale)]
        return []

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

    def _parts(self) -> list[tuple[str, _Rung]]:
        parts: dict[str, _Rung | None] = {
            "clip": self.clip,
            "budget": self.budget,
            "schedule": self.schedule,
            "rate": self.rate,
            "followed": self.followed,
            "rollback": self.rollback,
        }
        return [(name, part) for name, part in parts.items() if part is not None]


def _schedule(settings: LadderSettings) -> RatioSchedule | None:
    """That of the cap; a run is trusted only if going back and a lower rate are in use."""
    if settings.cap is None:
        return None
    trusting = settings.rollback is not None and settings.backoff is not None
    return RatioSchedule(settings.cap, trusting=trusting)
