"""The detector of a diverging loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Finding, Pathology, Remedy, Severity
from lightning_gradguard.diagnose.progress import LossProgress, known_loss
from lightning_gradguard.diagnose.thresholds import Thresholds

_DIVERGING = (
    Remedy(
        "Lower the learning rate.",
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * lr)",
    ),
    Remedy(
        "Let the guard cap the updates, so that no step moves the weights too far.",
        "Trainer(callbacks=[GradGuard()])",
    ),
    Remedy(
        "Check the sign of the loss and that its gradient is not accumulated across steps.",
        "optimizer.zero_grad()",
    ),
)


class DivergingDetector:
    """A loss that has left its best level for good.

    Judged once per block of steps, on the block's lower quartile, so neither outliers nor noise
    that grew count. Above the best level for `diverging_blocks` blocks is `INFO`, and a `WARNING`
    once `lost_progress` of the progress is gone. Above the early level for `far_blocks` blocks, or
    without a single loss as good as the early level for `diverging_blocks` blocks, is a `WARNING`;
    either for `critical_blocks` blocks is `CRITICAL`. Where the run changes course, the best level
    is that of the new phase, see `LossProgress`.
    """

    _above_best: int
    _above_early: int
    _never_early: int

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = thresholds or Thresholds()
        self._progress = LossProgress(self._thresholds)
        self._episode = Episode(self._thresholds.heal_steps)
        self.reset()

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        if observation.new_phase:
            self._progress.new_phase()
        loss = known_loss(observation)
        if loss is None or not self._progress.update(loss):
            return []
        progress, t = self._progress, self._thresholds
        self._above_best = self._above_best + 1 if progress.above_best(progress.low) else 0
        self._above_early = self._above_early + 1 if progress.above_early(progress.low) else 0
        self._never_early = self._never_early + 1 if progress.never_early() else 0
        severity = self._severity()
        if severity is None:
            if not (self._above_best or self._never_early):
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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        self._progress.load_state_dict(state["progress"])
        self._episode.load_state_dict(state["episode"])
        self._above_best = state["above_best"]
        self._above_early = state["above_early"]
        self._never_early = state["never_early"]

    def reset(self) -> None:
        """Forgets everything."""
        self._progress.reset()
        self._episode.reset()
        self._above_best = 0
        self._above_early = 0
        self._never_early = 0

    def _severity(self) -> Severity | None:
        t, progress = self._thresholds, self._progress
        if max(self._above_early, self._never_early) >= t.critical_blocks:
            return Severity.CRITICAL
        if self._above_early >= t.far_blocks or self._never_early >= t.diverging_blocks:
            return Severity.WARNING
        if self._above_best < t.diverging_blocks:
            return None
        lost = progress.lost(progress.level) >= t.lost_progress
        return Severity.WARNING if lost else Severity.INFO

    def _finding(self, observation: Observation, severity: Severity) -> Finding:
        progress = self._progress
        blocks = max(self._above_best, self._above_early, self._never_early)
        steps = blocks * self._thresholds.block
        if severity is Severity.INFO:
            follows = "so the run may be starting to diverge"
        elif severity is Severity.WARNING:
            follows = "so the run is undoing what it learned"
        else:
            follows = "so only earlier weights or a new start will save the run"
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
            f"The loss is near {progress.level:.4g} and has been above its best level "
            f"{progress.best:.4g} for {steps} steps (early in training it was "
            f"{progress.early:.4g}), {follows}.",
            _DIVERGING,
            since=max(0, observation.step - steps + 1),
        )
