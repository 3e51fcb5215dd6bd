"""The detector of a diverging loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_gradguard.diagnose.baseline import log_norm
from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.progress import LossProgress, known_loss
from lightning_gradguard.diagnose.thresholds import Thresholds


class DivergingDetector:
    """A loss that has left its best level for good.

    Judged once per block of steps, on the block's lower quartile, so neither outliers nor noise
    that grew count. Above the best level for `diverging_blocks` blocks is `INFO`, and a `WARNING`
    once `lost_progress` of the progress is gone. Above the early level for `far_blocks` blocks, or
    without a single loss as good as the early level for `diverging_blocks` blocks, is a `WARNING`;
    either for `critical_blocks` blocks is `CRITICAL`. Where the run changes course, the best level
    is that of the new phase, see `LossProgress`.

    A loss that runs away below zero, for `far_blocks` blocks and beside a gradient that has grown
    by `start_growth`, is a `WARNING` too: its sign is wrong, or it has no lower bound.
    """

    _above_best: int
    _above_early: int
    _never_early: int
    _running_away: int
    _first_norm: float | None

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = thresholds or Thresholds()
        self._progress = LossProgress(self._thresholds)
        self._episode = Episode(self._thresholds.heal_steps)
        self.reset()

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        if observation.new_phase:
            self._progress.new_phase()
        loss, norm = known_loss(observation), log_norm(observation.total_norm)
        if self._first_norm is None and math.isfinite(norm):
            self._first_norm = norm
        if loss is None or not self._progress.update(loss):
            return []
        progress, t = self._progress, self._thresholds
        grown = self._first_norm is not None and norm > self._first_norm + t.start_growth
        away = grown and progress.runs_away()
        self._running_away = self._running_away + 1 if away else 0
        self._above_best = self._above_best + 1 if progress.above_best(progress.low) else 0
        self._above_early = self._above_early + 1 if progress.above_early(progress.low) else 0
        self._never_early = self._never_early + 1 if progress.never_early() else 0
        severity = self._severity()
        if severity is None:
            if not (self._above_best or self._never_early or self._running_away):
                self._episode.calm(t.block)
            return []
        if not self._episode.report(severity):
            return []
        return [self._finding(observation, severity)]

    def is_open(self, where: str) -> bool:
        """Whether the finding has not healed; see `Detector.is_open`."""
        return self._episode.open

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; see `Detector.state_dict`."""
        return {
            "progress": self._progress.state_dict(),
            "episode": self._episode.state_dict(),
            "above_best": self._above_best,
            "above_early": self._above_early,
            "never_early": self._never_early,
            "running_away": self._running_away,
            "first_norm": self._first_norm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        self._progress.load_state_dict(state["progress"])
        self._episode.load_state_dict(state["episode"])
        self._above_best = state["above_best"]
        self._above_early = state["above_early"]
        self._never_early = state["never_early"]
        self._running_away = state["running_away"]
        self._first_norm = state["first_norm"]

    def reset(self) -> None:
        """Forgets everything."""
        self._progress.reset()
        self._episode.reset()
        self._above_best = 0
        self._above_early = 0
        self._never_early = 0
        self._running_away = 0
        self._first_norm = None

    def _severity(self) -> Severity | None:
        t, progress = self._thresholds, self._progress
        if max(self._above_early, self._never_early) >= t.critical_blocks:
            return Severity.CRITICAL
        if self._above_early >= t.far_blocks or self._never_early >= t.diverging_blocks:
            return Severity.WARNING
        if self._running_away >= t.far_blocks:
            return Severity.WARNING
        if self._above_best < t.diverging_blocks:
            return None
        lost = progress.lost(progress.level) >= t.lost_progress
        return Severity.WARNING if lost else Severity.INFO

    def _finding(self, observation: Observation, severity: Severity) -> Finding:
        progress = self._progress
        blocks = max(self._above_best, self._above_early, self._never_early, self._running_away)
        steps = blocks * self._thresholds.block
        if severity is Severity.INFO:
            follows = "so the run may be starting to diverge"
        elif severity is Severity.WARNING:
            follows = "so the run is undoing what it learned"
        else:
            follows = "so only earlier weights or a new start will save the run"
        sentence = (
            f"The loss is near {progress.level:.4g} and has been above its best level "
            f"{progress.best:.4g} for {steps} steps (early in training it was "
            f"{progress.early:.4g}), {follows}."
        )
        if self._running_away:
            sentence = (
                f"The loss has fallen from {progress.early:.4g} to {progress.level:.4g} and falls "
                "as fast as ever, so its sign is wrong or it has no lower bound."
            )
        return Finding(
            Pathology.DIVERGING,
            severity,
            "loss",
            observation.step,
            {
                "loss": progress.level,
                "best": progress.best,
                "early": progress.early,
                "lost": min(progress.lost(progress.level), 1e6),
                "steps": float(steps),
            },
            sentence,
            since=max(0, observation.step - steps + 1),
        )
