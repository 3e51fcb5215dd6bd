"""The functional evidence: is the loss better than early in training, or has it got worse?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from lightning_gradguard.diagnose.baseline import MAD_TO_SCALE
from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.stages import LossStages
from lightning_gradguard.diagnose.thresholds import Thresholds

# Far from float64's limit, so that differences of two losses and their multiples stay finite.
_LARGEST = 1e300


def known_loss(observation: Observation) -> float | None:
    """Returns the loss if it is known and finite, kept where its differences cannot overflow."""
    loss = observation.loss
    if loss is None or not -math.inf < loss < math.inf:
        return None
    if -_LARGEST < loss < _LARGEST:
        return loss
    return math.copysign(_LARGEST, loss)


class LossProgress:
    """Early, best and present level of the loss, from medians of blocks of steps.

    After a change of course (`new_phase`) the best level of the new phase takes the place of the
    best of all where a rise is judged: a restart of the learning rate lifts the loss, and it is
    the way back down that counts.

    Everything is a difference measured in noise scales or in the improvement made so far, so
    neither scaling nor a negative loss matters. Only a positive level also gives a margin in
    proportion to itself (`Thresholds.level_margin`): a loss that was ever below zero has no natural
    zero to be in proportion to.
    """

    _block: list[float]
    _previous: list[float]
    _count: int
    _moves: list[float]
    _wander: float
    _grace: int
    _phase_best: float
    _phase_noise: float
    _lowest_ever: float
    first: float
    start: float
    early: float
    early_noise: float
    best: float
    best_noise: float
    level: float
    low: float
    lowest: float

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self.stages = LossStages(thresholds)
        self.reset()

    @property
    def ready(self) -> bool:
        """Whether there is an early level and enough later losses to compare with it."""
        return self._count >= self._thresholds.early_steps + self._thresholds.recent

    @property
    def present(self) -> float:
        """Median of the last `recent` losses."""
        recent = self._thresholds.recent
        missing = recent - len(self._block)
        if missing <= 0:
            return median(self._block[-recent:])
        return median(self._previous[-missing:] + self._block)

    @property
    def count(self) -> int:
        """Losses entered."""
        return self._count

    @property
    def positive(self) -> bool:
        """Whether no loss was below zero, so that a share of it means something.

        One of exactly zero is no sign of another kind: a hinge loss that is solved, or a
        cross-entropy that is rounded.
        """
        return self._lowest_ever >= 0.0

    def new_phase(self) -> None:
        """Takes in that the run changed course: what rises next is not a loss of progress yet."""
        if self._count >= self._thresholds.block:
            self._grace = self._thresholds.phase_blocks

    def update(self, loss: float) -> bool:
        """Enters a finite loss; returns whether it completed a block."""
        block = self._block
        if not self._count:
            self.first = self._lowest_ever = loss
        elif loss < self._lowest_ever:
            self._lowest_ever = loss
        block.append(loss)
        self._count += 1
        if self._count == self._thresholds.early_steps:
            self._set_first_reference()
        if len(block) < self._thresholds.block:
            return False
        self._finish_block()
        return True

    def share_above(self, limit: float, count: int) -> float:
        """Returns the share of the last `count` losses that exceed `limit`."""
        tail = (self._previous + self._block)[-count:]
        return sum(loss > limit for loss in tail) / count

    def lost(self, level: float) -> float:
        """Returns the share of the improvement since early training that `level` gives back.

        0 at the best level, 1 at the early level. Where nothing was gained, the unit is the
        noise of the early losses instead.
        """
        unit = max(self.early - self.best, 0.5 * self._margin(self.early, self.early_noise))
        rise = level - (self.best if self._grace else self._phase_best)
        if rise <= 0.0:
            return 0.0
        return rise / unit if unit > 0.0 else math.inf

    def above_best(self, level: float) -> bool:
        """Whether `level` is above the best level by more than noise; not yet in a new phase."""
        best = self._phase_best
        return not self._grace and level > best + self._margin(best, self._phase_noise)

    def above_early(self, level: float) -> bool:
        """Whether `level` is above the early level by more than noise."""
        return level > self.early + self._margin(self.early, self.early_noise)

    def never_early(self) -> bool:
        """Whether not one loss of the last block was as good as the early level.

        Needs no noise scale, which a run that blows up in its first steps never shows.
        """
        later = self._count > self._thresholds.block
        return later and self.lowest > self.early + self._margin(self.early, 0.0)

    def doubled(self, loss: float) -> bool:
        """Whether `loss` is more than twice the first, or beyond noise if that is not positive."""
        unit = self.first if self.first > 0.0 else self._thresholds.margin * self.early_noise
        return self._count > 1 and loss - self.first > unit

    def is_worse(self) -> bool:
        """The gate: the present loss has lost a decisive part of the progress, beyond noise."""
        if not self.ready:
            return False
        present = self.present
        above = self.above_early(present) if self._grace else self.above_best(present)
        return above and self.lost(present) >= self._thresholds.lost_progress

    def is_stuck(self, *, alone: bool = False) -> bool:
        """The gate: the loss shows that this run does not learn.

        In a young run the present loss is no better than the first block. From `stage_points`
        blocks on, the level of the last quarter is no better, beyond noise, than it was in the
        first steps so far (`early_share`; `fallen_share` if it has fallen), and does not fall. So a
        run that learned the mean of its targets at once and nothing since is stuck; one that
        improved for longer is not, nor one that improves slowly, nor one whose loss ever fell below
        `solved_level` of its start.

        Args:
            alone: Whether there is no other symptom, so that this is all the evidence.
        """
        if not self.ready:
            return False
        if not self.stages.ready:
            return self._is_stuck_young()
        t = self._thresholds
        solved = self.positive and self.best < t.solved_level * self.start
        if solved or self.best == self.start == 0.0:
            return False
        share, slack = t.early_share, 0.0
        if self.has_fallen(alone=alone):
            share = t.fallen_share_alone if alone else t.fallen_share
            slack = t.reached * (self.start - self.stages.present)
        return self.stages.is_stuck(share, slack, self.present, positive=self.positive)

    def crawls(self, planned_steps: int | None) -> bool:
        """Whether a decisive part of the run has gained next to nothing, however surely.

        Enough beside a symptom that says why, and never by itself: many a run starts slowly.

        Args:
            planned_steps: Optimizer steps that the run is planned to take, if known.
        """
        t = self._thresholds
        least = t.stagnation_unplanned
        if planned_steps:
            least = max(t.stagnation_steps, int(t.crawl_share * planned_steps))
        if not (self.positive and self.stages.ready and self._count >= least):
            return False
        return self.stages.present > (1.0 - t.crawl_gain) * self.start

    def runs_away(self) -> bool:
        """Whether the loss falls without end: far below zero, and as fast as ever.

        A likelihood of continuous data falls below zero too, but slows down. What falls like this
        is maximized by mistake, or has no lower bound.
        """
        far = self.level < -self._thresholds.runaway_level * max(abs(self.start), self.early_noise)
        return far and self.stages.is_steepest()

    def has_fallen(self, *, alone: bool = False) -> bool:
        """Whether a stuck loss is far below its first level, so that it may be all it can be.

        Args:
            alone: Whether there is no other symptom: then less of a fall is enough to doubt.
        """
        level = self.stages.present if self.stages.ready else self.level
        share = self._thresholds.fallen_level_alone if alone else self._thresholds.fallen_level
        return self.positive and level < share * self.start

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers and lists."""
        return {
            "block": list(self._block),
            "previous": list(self._previous),
            "count": self._count,
            "early": self.early,
            "early_noise": self.early_noise,
            "best": self.best,
            "best_noise": self.best_noise,
            "level": self.level,
            "low": self.low,
            "lowest": self.lowest,
            "first": self.first,
            "moves": list(self._moves),
            "start": self.start,
            "lowest_ever": self._lowest_ever,
            "grace": self._grace,
            "phase_best": self._phase_best,
            "phase_noise": self._phase_noise,
            "stages": self.stages.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self._block = list(state["block"])
        self._previous = list(state["previous"])
        self._count = state["count"]
        self.early = state["early"]
        self.early_noise = state["early_noise"]
        self.best = state["best"]
        self.best_noise = state["best_noise"]
        self.level = state["level"]
        self.low = state["low"]
        self.lowest = state["lowest"]
        self.first = state["first"]
        self._moves = list(state["moves"])
        self._wander = self._measure_wander()
        self.start = state["start"]
        self._lowest_ever = state["lowest_ever"]
        self._grace = state["grace"]
        self._phase_best = state["phase_best"]
        self._phase_noise = state["phase_noise"]
        self.stages.load_state_dict(state["stages"])

    def reset(self) -> None:
        """Forgets everything."""
        self._block = []
        self._previous = []
        self._count = 0
        self._moves = []
        self._wander = 0.0
        self.first = self.early = self.early_noise = 0.0
        self.best = self.best_noise = self._phase_best = self._phase_noise = 0.0
        self.start = self._lowest_ever = 0.0
        self._grace = 0
        self.stages.reset()
        self.level = self.low = self.lowest = 0.0

    def _is_stuck_young(self) -> bool:
        # Early losses that fall steeply have a spread as large as their level; it must not hide
        # that a positive loss is at a fraction of it.
        better = self.early > 0.0 and self.present < self._thresholds.better_level * self.early
        return not better and self.present >= self.early - self.early_noise

    def _margin(self, level: float, noise: float) -> float:
        t = self._thresholds
        share = t.level_margin if self._wander_is_known() else t.young_level_margin
        noise = max(noise, t.wander_margin * self._wander)
        return max(t.margin * noise, share * level, 0.0)

    def _wander_is_known(self) -> bool:
        return len(self._moves) >= self._thresholds.least_moves

    def _measure_wander(self) -> float:
        """Typical move of the level between blocks: slow waves do not show within one."""
        return median(self._moves) if self._wander_is_known() else 0.0

    def _set_first_reference(self) -> None:
        # The range, not the MAD: a MAD of so few values is often near zero by chance.
        self.early = self.best = self._phase_best = median(self._block)
        # A run that blows up at its first update began where its first loss was.
        self.start = min(self.first, self.early)
        spread = max(self._block) - min(self._block)
        self.early_noise = self.best_noise = self._phase_noise = spread

    def _finish_block(self) -> None:
        block = self._block
        ranked = sorted(block)
        level = median(ranked)
        noise = MAD_TO_SCALE * median(abs(loss - level) for loss in ranked)
        if self._count == len(block):
            # A run that blows up inside its first block keeps its first losses as the reference.
            if not self.above_early(level):
                self.early = self.best = self._phase_best = level
            self.early_noise = self.best_noise = self._phase_noise = noise
        else:
            moves = [*self._moves, abs(level - self.level)]
            self._moves = moves[-self._thresholds.moves :]
            self._wander = self._measure_wander()
        if level < self.best:
            self.best, self.best_noise = level, noise
        if self._grace or level < self._phase_best:
            self._phase_best, self._phase_noise = level, noise
        self._grace = max(0, self._grace - 1)
        self.stages.enter(level)
        self.level, self.low, self.lowest = level, ranked[len(ranked) // 4], ranked[0]
        self._previous, self._block = block, []
