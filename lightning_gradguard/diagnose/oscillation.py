"""The detector of a loss that swings instead of falling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from lightning_gradguard.diagnose.baseline import MAD_TO_SCALE
from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.progress import LossProgress, known_loss
from lightning_gradguard.diagnose.thresholds import Thresholds


class OscillatingDetector:
    """A loss that swings far beyond its noise and gets no better by it.

    Judged once per window of `swing_window` losses. Noise alone also alternates at every step; it
    is measured by the moves from step to step, in the calmest window so far. There is a swing when
    the spread of a window exceeds `swing_ratio` times that noise, or, in a run that has no calm
    window, when every loss lies above the very first one, which no update had touched; in both
    cases by a `swing_level` of a positive level, and without a new best level. In two windows in a
    row it is `INFO`; in `swing_windows` it is a `WARNING` if the loss is no better than early in
    training, be it on average, or worse.
    """

    _calm: float
    _calm_share: float
    _best: float
    _first_mean: float
    _swings: int
    _above: int
    _window: list[float]

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = thresholds or Thresholds()
        self._progress = LossProgress(self._thresholds)
        self._episode = Episode(self._thresholds.slow_heal_steps)
        self.reset()

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        if observation.new_phase:
            # A window in which the course changed says nothing of swings.
            self._progress.new_phase()
            self._window = []
            self._swings = 0
        loss = known_loss(observation)
        if loss is None:
            return []
        self._progress.update(loss)
        self._window.append(loss)
        if len(self._window) < self._thresholds.swing_window:
            return []
        window, self._window = self._window, []
        if self._first_mean == math.inf:
            self._first_mean = fmean(window[: self._thresholds.block])
        return self._judge(observation.step, window)

    def is_open(self, where: str) -> bool:
        """Whether the finding has not healed; see `Detector.is_open`."""
        return self._episode.open

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; see `Detector.state_dict`."""
        return {
            "progress": self._progress.state_dict(),
            "episode": self._episode.state_dict(),
            "calm": self._calm if self._calm < math.inf else None,
            "calm_share": self._calm_share if self._calm_share < math.inf else None,
            "best": self._best if self._best < math.inf else None,
            "first_mean": self._first_mean if self._first_mean < math.inf else None,
            "swings": self._swings,
            "above": self._above,
            "window": list(self._window),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        self._progress.load_state_dict(state["progress"])
        self._episode.load_state_dict(state["episode"])
        self._calm, self._calm_share, self._best, self._first_mean = (
            math.inf if state[name] is None else state[name]
            for name in ("calm", "calm_share", "best", "first_mean")
        )
        self._swings = state["swings"]
        self._above = state["above"]
        self._window = list(state["window"])

    def reset(self) -> None:
        """Forgets everything."""
        self._progress.reset()
        self._episode.reset()
        self._calm = self._calm_share = self._best = self._first_mean = math.inf
        self._swings = self._above = 0
        self._window = []

    def _judge(self, step: int, window: list[float]) -> list[Finding]:
        t, progress = self._thresholds, self._progress
        level, spread = median(window), _spread(window)
        noise = self._learn_noise(window, level)
        new_best = level < self._best
        self._best = min(self._best, level)
        least = t.swing_level * level if progress.positive else 0.0
        swings = spread > max(t.swing_ratio * noise, least) and not new_best
        self._swings = self._swings + 1 if swings else 0
        self._above = self._above + 1 if self._is_above_first(window, spread) else 0
        lasting = max(self._swings, self._above if self._above >= t.swing_windows else 0)
        if lasting < min(2, t.swing_windows):
            if not swings:
                self._episode.calm(t.swing_window)
            return []
        # A swing may touch zero each time, and be worse on average than before training.
        worse = progress.positive and fmean(window) > t.swing_mean * self._first_mean
        bad = worse or progress.is_worse() or progress.is_stuck()
        severity = Severity.WARNING if bad and lasting >= t.swing_windows else Severity.INFO
        if not self._episode.report(severity):
            return []
        return [self._finding(step, severity, level, spread, noise, lasting)]

    def _learn_noise(self, window: list[float], level: float) -> float:
        """Returns the noise of the calmest window, in proportion to the level if that is more."""
        moves = [b - a for a, b in pairwise(window)]
        noise = MAD_TO_SCALE * median(map(abs, moves)) / math.sqrt(2.0)
        self._calm = min(self._calm, noise)
        if not (self._progress.positive and level > 0.0):
            return self._calm
        self._calm_share = min(self._calm_share, noise / level)
        return max(self._calm, self._calm_share * level)

    def _is_above_first(self, window: list[float], spread: float) -> bool:
        """Whether it swings above the level of the untrained model, without a single loss below."""
        progress, share = self._progress, self._thresholds.swing_level
        if not progress.positive:
            return False
        first = self._above == 0 and progress.count == len(window)
        losses = window[1:] if first else window
        lowest, least = (1.0 + share) * progress.first, 0.5 * share * median(window)
        return min(losses) > lowest and spread > least

    def _finding(
        self, step: int, severity: Severity, level: float, spread: float, noise: float, windows: int
    ) -> Finding:
        steps = windows * self._thresholds.swing_window
        if severity is Severity.INFO:
            follows = "which is harmless as long as its level falls"
        else:
            follows = "and its level gets no better, so the updates overshoot"
        return Finding(
            Pathology.OSCILLATING,
            severity,
            "loss",
            step,
            {
                "loss": level,
                "spread": spread,
                "noise": noise,
                "best": self._progress.best,
                "steps": float(steps),
            },
            f"The loss swings by {spread:.3g} around {level:.4g} for {steps} steps, {follows}.",
            since=max(0, step - steps + 1),
        )


def _spread(losses: list[float]) -> float:
    """Standard deviation from the interquartile range, which two outliers do not move."""
    ranked = sorted(losses)
    quarter = len(ranked) // 4
    return (ranked[-1 - quarter] - ranked[quarter]) / 1.349
