"""The detector of loss spikes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gradguard.diagnose.baseline import RobustBaseline
from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.progress import LossProgress, known_loss
from lightning_gradguard.diagnose.thresholds import Thresholds


class LossSpikeDetector:
    """A loss far above the recent losses: `INFO`, and a `WARNING` when it stays there.

    The warning needs the spike to last `spike_persistence` steps and to give back a decisive part
    of the progress (`lost_progress`): a restart of the learning rate also lifts the loss for
    long, but not back to where training began. Where the run changes course, the usual loss is
    learned anew.
    """

    _steps: int
    _below: int
    _limit: float
    _usual: float
    _since: int
    _tallest: float

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = t = thresholds or Thresholds()
        self._baseline = RobustBaseline(
            t.window,
            t.warmup,
            t.accept_after,
            t.outlier_z,
            scale_floor=0.0,
            relative_floor=t.loss_floor,
        )
        self._progress = LossProgress(t)
        self._episode = Episode(t.heal_steps)
        self.reset()

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        if observation.new_phase:
            self._baseline.relearn()
            self._tallest = 0.0
            self._progress.new_phase()
        loss = known_loss(observation)
        if loss is None:
            return []
        baseline = self._baseline
        t = self._thresholds
        usual, limit = baseline.median, baseline.threshold(t.outlier_z)
        excess = loss - usual if baseline.ready else 0.0
        stands_out = excess > t.tail_factor * max(self._tallest, baseline.highest - usual)
        self._tallest = max(excess, self._tallest * (1.0 - 1.0 / t.window))
        z = baseline.update(loss)
        self._progress.update(loss)
        if self._steps:
            return self._follow(observation, loss, z)
        if not (z > t.outlier_z and stands_out):
            self._episode.calm()
            return []
        self._steps, self._limit, self._usual, self._since = 1, limit, usual, observation.step
        return self._report(observation, loss, z, Severity.INFO)

    def is_open(self, where: str) -> bool:
        """Whether the finding has not healed; see `Detector.is_open`."""
        return self._episode.open

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; see `Detector.state_dict`."""
        return {
            "baseline": self._baseline.state_dict(),
            "progress": self._progress.state_dict(),
            "episode": self._episode.state_dict(),
            "steps": self._steps,
            "limit": self._limit,
            "usual": self._usual,
            "below": self._below,
            "since": self._since,
            "tallest": self._tallest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        self._baseline.load_state_dict(state["baseline"])
        self._progress.load_state_dict(state["progress"])
        self._episode.load_state_dict(state["episode"])
        self._steps = state["steps"]
        self._limit = state["limit"]
        self._usual = state["usual"]
        self._below = state["below"]
        self._since = state["since"]
        self._tallest = state["tallest"]

    def reset(self) -> None:
        """Forgets everything."""
        self._baseline.reset()
        self._progress.reset()
        self._episode.reset()
        self._steps = 0
        self._limit = self._usual = 0.0
        self._below = self._since = 0
        self._tallest = 0.0

    def _follow(self, observation: Observation, loss: float, z: float) -> list[Finding]:
        """Watches an open spike against the limit of the steps before it."""
        t = self._thresholds
        self._steps += 1
        self._below = 0 if loss > self._limit else self._below + 1
        # Past a whole window the level is simply the level, and later spikes start from it.
        if self._below >= t.spike_persistence or self._steps > t.window:
            self._steps = self._below = 0
            self._episode.calm(t.spike_persistence)
            return []
        share = self._progress.share_above(self._limit, t.spike_persistence)
        if self._steps < t.spike_steps or share < t.spike_share or not self._progress.is_worse():
            return []
        return self._report(observation, loss, z, Severity.WARNING)

    def _report(
        self, observation: Observation, loss: float, z: float, severity: Severity
    ) -> list[Finding]:
        if not self._episode.report(severity):
            return []
        if severity is Severity.INFO:
            text = (
                f"The loss jumped to {loss:.4g} from about {self._usual:.4g}, which a single hard "
                "batch can explain, so watch whether it recovers."
            )
        else:
            text = (
                f"The loss has stayed near {self._progress.present:.4g} for {self._steps} steps "
                f"after a jump from about {self._usual:.4g}, so the weights were damaged and much "
                "of the progress is gone."
            )
        evidence = {
            "loss": loss,
            "usual": self._usual,
            "limit": self._limit,
            "z": max(-1e6, min(z, 1e6)),
            "steps": float(self._steps),
        }
        return [
            Finding(
                Pathology.LOSS_SPIKE,
                severity,
                "loss",
                observation.step,
                evidence,
                text,
                since=self._since,
            )
        ]
