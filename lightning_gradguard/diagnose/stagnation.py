"""The detector of a loss that does not fall."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

from lightning_gradguard.diagnose.baseline import MAD_TO_SCALE, log_norm
from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.progress import LossProgress, known_loss
from lightning_gradguard.diagnose.thresholds import Thresholds


class StagnatingDetector:
    """A loss that is flat at a level it had early in training: nothing is learned.

    `INFO` after `flat_steps`; a `WARNING` when the plateau has lasted `stagnation_share` of the
    planned steps (at least `stagnation_steps`), or `stagnation_unplanned` steps without a plan.
    A plateau before a sudden drop is healthy, and patience is what protects it; so does a gradient
    that grows steadily, for the run is leaving it. A learning rate that still warms up, and a
    change of course, start the patience or a respite anew.

    A loss that fell far at once and then stays can be all that its data allow (noisy labels) or
    all that a sick model learns (the mean of its targets): the loss alone cannot tell. It is a
    `WARNING` only if it fell within the first `fallen_share_alone` of the run, so that nearly all
    of it changed nothing, and never once the gradient is gone.
    """

    _begun: int
    _highest_lr: float
    _norms: list[float]
    _norm_levels: list[float]
    _first_norm: float | None
    _respite: int

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = thresholds or Thresholds()
        self._progress = LossProgress(self._thresholds)
        self._episode = Episode(self._thresholds.slow_heal_steps)
        self.reset()

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        loss = known_loss(observation)
        if observation.new_phase:
            self._progress.new_phase()
            self._respite = self._progress.count + self._thresholds.flat_steps
        self._follow_warm_up(observation.lr)
        norm = log_norm(observation.total_norm)
        if math.isfinite(norm):
            self._norms.append(norm)
        if loss is None:
            self._norms = self._norms[-self._thresholds.block :]
            return []
        if not self._progress.update(loss):
            return []
        self._finish_block()
        if not self._is_stagnating():
            self._episode.calm(self._thresholds.block)
            return []
        count = self._progress.count
        age, flat = count - self._begun, self._flat_steps()
        if min(age, flat) < self._thresholds.flat_steps or count < self._respite:
            return []
        lasting = age >= self._patience(observation.model.planned_steps)
        # Without a natural zero nothing tells what has been gained: a policy's loss stays near it.
        sure = lasting and self._progress.positive and self._progress.is_stuck(alone=True)
        sure = sure and not self._is_leaving()
        severity = Severity.WARNING if sure else Severity.INFO
        if not self._episode.report(severity):
            return []
        return [self._finding(observation.step, severity)]

    def is_open(self, where: str) -> bool:
        """Whether the finding has not healed; see `Detector.is_open`."""
        return self._episode.open

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; see `Detector.state_dict`."""
        return {
            "progress": self._progress.state_dict(),
            "episode": self._episode.state_dict(),
            "begun": self._begun,
            "highest_lr": self._highest_lr,
            "norms": list(self._norms),
            "norm_levels": list(self._norm_levels),
            "first_norm": self._first_norm,
            "respite": self._respite,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        self._progress.load_state_dict(state["progress"])
        self._episode.load_state_dict(state["episode"])
        self._begun = state["begun"]
        self._highest_lr = state["highest_lr"]
        self._norms = list(state["norms"])
        self._norm_levels = list(state["norm_levels"])
        self._first_norm = state["first_norm"]
        self._respite = state["respite"]

    def reset(self) -> None:
        """Forgets everything."""
        self._progress.reset()
        self._episode.reset()
        self._begun = self._respite = 0
        self._highest_lr = 0.0
        self._norms, self._norm_levels = [], []
        self._first_norm = None

    def _follow_warm_up(self, lr: float) -> None:
        """Patience begins where the learning rate has reached its highest value."""
        if not self._highest_lr < lr < math.inf:
            return
        if self._highest_lr > 0.0:
            self._begun = self._progress.count
        self._highest_lr = lr

    def _finish_block(self) -> None:
        if not self._norms:
            return
        level = median(self._norms)
        if self._first_norm is None:
            self._first_norm = level
        kept = self._thresholds.leaving_blocks + 1
        self._norm_levels = [*self._norm_levels, level][-kept:]
        self._norms = []

    def _is_stagnating(self) -> bool:
        progress = self._progress
        # A loss that rises is flat in no sense: that is a divergence.
        if not progress.stages.ready or progress.is_worse() or not progress.is_stuck():
            return False
        return not (progress.has_fallen() and self._is_gone())

    def _is_gone(self) -> bool:
        """Whether hardly any of the gradient is left: the run has converged."""
        if self._first_norm is None or not self._norm_levels:
            return False
        share = self._thresholds.gone_gradient
        return share > 0.0 and self._norm_levels[-1] < self._first_norm + math.log(share)

    def _is_leaving(self) -> bool:
        """Whether the gradient grows steadily, as it does on the way off a saddle."""
        levels, t = self._norm_levels, self._thresholds
        if len(levels) <= t.leaving_blocks:
            return False
        moves = [abs(b - a) for a, b in pairwise(levels)]
        # Of the moves of a steady growth the median is the growth itself, so it must exceed only
        # the share of it that chance adds up to.
        noise = MAD_TO_SCALE * median(abs(move - median(moves)) for move in moves)
        return levels[-1] - levels[0] > max(t.leaving_growth, t.margin * noise)

    def _flat_steps(self) -> int:
        progress = self._progress
        blocks = progress.stages.flat_blocks(positive=progress.positive)
        return min(blocks * self._thresholds.block, progress.count)

    def _patience(self, planned_steps: int | None) -> int:
        t = self._thresholds
        if planned_steps is None:
            return t.stagnation_unplanned
        return max(t.stagnation_steps, int(t.stagnation_share * planned_steps))

    def _finding(self, step: int, severity: Severity) -> Finding:
        progress = self._progress
        level = progress.stages.present
        steps = self._flat_steps()
        if severity is Severity.INFO:
            follows = "which a plateau before a drop can explain"
        elif progress.has_fallen(alone=True):
            follows = "so the run learns nothing more unless this is the best the data allow"
        else:
            follows = "so the run learns nothing"
        return Finding(
            Pathology.STAGNATING,
            severity,
            "loss",
            step,
            {
                "loss": level,
                "start": progress.start,
                "best": progress.best,
                "steps": float(steps),
            },
            f"The loss has stayed near {level:.4g} for {steps} steps after a start at "
            f"{progress.start:.4g}, {follows}.",
            since=max(0, step - steps + 1),
        )
