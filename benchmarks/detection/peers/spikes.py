"""Rules that look for spikes of the loss or of the gradient norm, re-implemented.

What they do about a spike (skip, clip, stop) is left out: the run goes on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

from benchmarks.detection.peers.rules import Firing, RulePeer, total_norm
from benchmarks.detection.records import StepFeatures
from lightning_gradguard.diagnose import Pathology


class OLMoSkipStep(RulePeer):
    """OLMo-core's step skipping: loss or gradient norm above mean + 6σ of the last 128 steps.

    A value that is not finite is no smaller than the bound, and stays in the window as there.
    """

    name = "OLMo-core SkipStep"
    window, least, sigmas = 128, 64, 6.0

    def __init__(self) -> None:
        super().__init__()
        self._losses: deque[float] = deque(maxlen=self.window)
        self._norms: deque[float] = deque(maxlen=self.window)

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """Loss, then norm."""
        for values, value, cause in (
            (self._losses, features.loss, Pathology.LOSS_SPIKE),
            (self._norms, total_norm(features.tensors), Pathology.EXPLODING),
        ):
            if len(values) >= self.least and not value <= _bound(values, self.sigmas):
                finite = math.isfinite(value)
                yield Firing(cause.value, cause if finite else Pathology.NON_FINITE)
            values.append(value)


class KillLossSpike(RulePeer):
    """llm-foundry's callback: loss twice the mean of a window, 5 steps running, or high for long.

    Args:
        steps: Budget of the run.
    """

    name = "llm-foundry KillLossSpike"
    factor, patience, cap = 2.0, 5, 10.0
    least_window, window_share = 100, 0.05

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._losses: deque[float] = deque(
            maxlen=max(self.least_window, round(self.window_share * steps))
        )
        self._running = 0

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """Says nothing until the window is full."""
        losses = self._losses
        losses.append(features.loss)
        if len(losses) < (losses.maxlen or 0):
            return
        high = features.loss >= self.factor * _mean(losses)
        self._running = self._running + 1 if high else 0
        if self._running >= self.patience:
            yield Firing("loss spike", Pathology.LOSS_SPIKE)
        if sum(loss > self.cap for loss in losses) >= len(losses) / 2:
            yield Firing("high loss", Pathology.DIVERGING)


class SpikeDetection(RulePeer):
    """Lightning's callback: loss apart from the mean of the last 10 by twice that mean."""

    name = "Lightning SpikeDetection"
    window, warmup, tolerance = 10, 1, 2.0

    def __init__(self) -> None:
        super().__init__()
        self._losses: deque[float] = deque(maxlen=self.window)

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """A spike does not enter the mean."""
        loss, losses = features.loss, self._losses
        if features.step >= self.warmup and losses:
            if not math.isfinite(loss):
                yield Firing("loss is not finite", Pathology.NON_FINITE)
                return
            mean = _mean(losses)
            if loss > losses[-1] and abs(loss - mean) >= abs(self.tolerance * mean):
                yield Firing("loss spike", Pathology.LOSS_SPIKE)
                return
        losses.append(loss)


class ZClip(RulePeer):
    """ZClip's trigger: gradient norm with z > 2.5 against moving averages of clipped norms."""

    name = "ZClip"
    threshold, decay, warmup, floor = 2.5, 0.97, 25, 1e-6

    def __init__(self) -> None:
        super().__init__()
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """Says nothing during the warm-up; a norm that is NaN makes the averages NaN for good."""
        norm = total_norm(features.tensors)
        if len(self._first) < self.warmup:
            self._first.append(norm)
            if len(self._first) == self.warmup:
                self._mean, self._variance = _mean(self._first), _deviation(self._first, 0) ** 2
            return
        deviation = math.sqrt(self._variance)
        z = (norm - self._mean) / (deviation + self.floor)
        if z > self.threshold:
            yield Firing("gradient spike", Pathology.EXPLODING)
            norm = self._mean + self.threshold * deviation / (z / self.threshold)
        self._variance = self.decay * self._variance + (1 - self.decay) * (norm - self._mean) ** 2
        self._mean = self.decay * self._mean + (1 - self.decay) * norm


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float], degrees: int = 1) -> float:
    mean = _mean(values)
    # Products, as a power raises where a product of large numbers is infinite.
    return math.sqrt(sum((v - mean) * (v - mean) for v in values) / (len(values) - degrees))


def _bound(values: Sequence[float], sigmas: float) -> float:
    return _mean(values) + sigmas * _deviation(values)
