"""The detector of exploding gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from lightning_gradguard.diagnose.baseline import MAD_TO_SCALE, RobustBaseline, log_norm
from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.places import in_words, module_of
from lightning_gradguard.diagnose.progress import LossProgress, known_loss
from lightning_gradguard.diagnose.thresholds import Thresholds


class ExplodingDetector:
    """Gradient norm far above its own baseline, or growing without end.

    Symptoms, all of log-norms: a robust z beyond `outlier_z`; a CUSUM of block medians, the rise
    above the lowest level with an allowance per step; and, for a run that explodes from its first
    steps and so has no usual level, the rise above the very first norm beside a doubled loss.
    A symptom alone is `INFO`. It is a `WARNING` when it lasts `persistence` steps beside a loss
    that has lost its progress, when the growth lasts `stuck_persistence` steps beside a loss that
    is no better than early, or after `start_steps` steps of the third kind. Without a known loss
    there is no functional evidence, so no finding is above `INFO`.

    A zero norm is neither a symptom nor part of the baseline; non-finite norms are left to
    `NonFiniteDetector`. Where the run changes course, all levels of the norm are learned anew.
    """

    _block: list[float]
    _level: float | None
    _first: float | None
    _noise: float
    _tallest: float
    _growth: float
    _blown: int
    _growing_for: int
    _high: int
    _grows_since: int | None
    _since: int | None

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = t = thresholds or Thresholds()
        self._baseline = RobustBaseline(
            t.window, t.warmup, t.accept_after, t.outlier_z, scale_floor=t.gradient_floor
        )
        self._progress = LossProgress(t)
        self._episode = Episode(t.heal_steps)
        self.reset()

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        if observation.new_phase:
            self._start_phase()
        loss = known_loss(observation)
        if loss is not None:
            self._progress.update(loss)
        value = log_norm(observation.total_norm)
        if value == math.inf:
            return []
        if value == -math.inf:
            self._high = 0
            self._episode.calm()
            return []
        baseline, t = self._baseline, self._thresholds
        usual = baseline.median
        excess = value - usual if baseline.ready else 0.0
        stands_out = excess > t.tail_factor * max(self._tallest, baseline.highest - usual)
        self._tallest = max(excess, self._tallest * (1.0 - 1.0 / t.window))
        z = baseline.update(value)
        self._follow_start(value, loss)
        self._follow_growth(value, observation.step)
        if z > t.outlier_z:
            self._high = min(self._high + 1, 2 * t.persistence)
        elif self._high:
            # A dip must not hide that most steps are far out, so it costs two, not all.
            self._high = max(0, self._high - 2)
        # A converged run whose gradient comes back to where it began has not exploded.
        beyond = self._first is None or value > self._first + t.start_growth
        growing = beyond and self._growth >= max(t.growth, t.outlier_z * self._noise)
        self._growing_for = self._growing_for + 1 if growing else 0
        if not (growing or self._high or self._blown):
            self._since = None
            self._episode.calm()
            return []
        if self._since is None:
            self._since = self._grows_since if growing else observation.step
        return self._judge(observation, excess, z, (z > t.outlier_z and stands_out) or growing)

    def is_open(self, where: str) -> bool:
        """Whether the finding has not healed; see `Detector.is_open`."""
        return self._episode.open

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; see `Detector.state_dict`."""
        return {
            "baseline": self._baseline.state_dict(),
            "progress": self._progress.state_dict(),
            "episode": self._episode.state_dict(),
            "block": list(self._block),
            "level": self._level,
            "first": self._first,
            "noise": self._noise,
            "tallest": self._tallest,
            "growth": self._growth,
            "blown": self._blown,
            "growing_for": self._growing_for,
            "high": self._high,
            "grows_since": self._grows_since,
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        self._baseline.load_state_dict(state["baseline"])
        self._progress.load_state_dict(state["progress"])
        self._episode.load_state_dict(state["episode"])
        self._block = list(state["block"])
        self._level = state["level"]
        self._first = state["first"]
        self._noise = state["noise"]
        self._tallest = state["tallest"]
        self._growth = state["growth"]
        self._blown = state["blown"]
        self._growing_for = state["growing_for"]
        self._high = state["high"]
        self._grows_since = state["grows_since"]
        self._since = state["since"]

    def reset(self) -> None:
        """Forgets everything."""
        self._progress.reset()
        self._episode.reset()
        self._noise = 0.0
        self._relearn()

    def _start_phase(self) -> None:
        self._progress.new_phase()
        self._relearn()

    def _relearn(self) -> None:
        """Forgets every level of the norm, but not how noisy it is nor what was reported."""
        self._baseline.relearn()
        self._block = []
        self._level = None
        self._first = None
        self._tallest = 0.0
        self._growth = 0.0
        self._blown = 0
        self._growing_for = 0
        self._high = 0
        self._grows_since = self._since = None

    def _follow_start(self, value: float, loss: float | None) -> None:
        """Counts steps whose norm is far above the very first while the loss has doubled."""
        if self._first is None:
            self._first = value
        t = self._thresholds
        rise = value - self._first
        bound = t.start_growth
        if self._baseline.ready:
            bound = max(bound, t.margin * self._baseline.scale)
        if rise > bound and loss is not None and self._progress.doubled(loss):
            counts = t.start_jump if rise > t.growth else 1
            self._blown = min(self._blown + counts, 2 * t.start_steps)
        elif self._blown:
            self._blown = max(0, self._blown - t.start_leak)

    def _follow_growth(self, value: float, step: int) -> None:
        """One CUSUM step per block of log-norms, on its median, so that no outlier counts."""
        block = self._block
        block.append(value)
        size = self._thresholds.growth_block
        if len(block) < size:
            return
        level = median(block)
        noise = MAD_TO_SCALE * median(abs(v - level) for v in block)
        self._noise += self._thresholds.growth_noise_weight * (noise - self._noise)
        if self._level is not None:
            rise = level - self._level - self._thresholds.growth_allowance * size
            if not self._growth:
                self._grows_since = step - size + 1
            self._growth = max(0.0, self._growth + rise)
        self._level, self._block = level, []

    def _judge(
        self, observation: Observation, excess: float, z: float, reportable: bool
    ) -> list[Finding]:
        t = self._thresholds
        lasting = self._growing_for > 0 or (z > t.outlier_z and self._high >= t.persistence)
        worse = self._blown >= t.start_steps or (lasting and self._progress.is_worse())
        stuck = self._growing_for >= t.stuck_persistence and self._progress.is_stuck()
        severity = Severity.WARNING if worse or stuck else Severity.INFO
        if severity is Severity.INFO and not (reportable or self._episode.open):
            return []
        if not self._episode.report(severity):
            return []
        return [self._finding(observation, severity, excess, z, worse)]

    def _finding(
        self, observation: Observation, severity: Severity, excess: float, z: float, worse: bool
    ) -> Finding:
        where = _largest_module(observation.norms)
        if self._growing_for:
            rise, reference = self._growth, "its lowest level"
        elif self._blown >= self._thresholds.start_steps and self._first is not None:
            rise = log_norm(observation.total_norm) - self._first
            reference = "that of the first step"
        else:
            rise, reference = excess, "its usual level"
        times = math.exp(min(rise, 700.0))
        if severity is Severity.INFO:
            follows = "which is harmless as long as the loss does not rise"
        elif worse:
            follows = "and the loss is getting worse, so the next updates will damage the weights"
        else:
            follows = "and the loss is no better than early in training, so the run learns nothing"
        return Finding(
            Pathology.EXPLODING,
            severity,
            where,
            observation.step,
            {
                "total_norm": observation.total_norm,
                "ratio": times,
                "z": max(-1e6, min(z, 1e6)),
                "growth": self._growth,
                "steps": float(max(self._high, self._growing_for, self._blown)),
            },
            f"The gradient norm of {in_words(where)} is {times:.3g} times {reference}, {follows}.",
            since=self._since,
        )


def _largest_module(norms: Mapping[str, float] | None) -> str:
    finite = {name: norm for name, norm in (norms or {}).items() if math.isfinite(norm)}
    return module_of(max(finite, key=lambda name: finite[name])) if finite else "model"
