"""PulseGrad's rules (0.1.0), re-implemented from their description.

The description does not give the decay of the moving average nor its warm-up: 0.99 and 10 samples
here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.detection.peers.rules import Firing, RulePeer, non_finite, update_ratio, weights
from benchmarks.detection.records import StepFeatures, TensorFeatures
from lightning_gradguard.diagnose import Pathology

SLOPE = -0.15  # nats per layer back from the output
SAMPLES = 20  # running
EXPLOSION = 20.0  # times the moving average of the norm
DECAY, WARMUP = 0.99, 10
UPDATE = (1e-5, 1e-2)  # of the update to the weight
LEAST_LAYERS = 3


class PulseGrad(RulePeer):
    """All rules on one run."""

    name = "PulseGrad"

    def __init__(self) -> None:
        super().__init__()
        self._steep = 0
        self._norms: dict[str, tuple[float, int]] = {}
        self._zeros: dict[str, int] = {}

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """NaN, slope over depth, then each weight's gradient and update."""
        yield from non_finite(features)
        known = weights(features)
        self._steep = self._steep + 1 if depth_slope(known) < SLOPE else 0
        if self._steep >= SAMPLES:
            yield Firing("vanishing gradient", Pathology.VANISHING_IN_DEPTH, known[0].name)
        for tensor in known:
            yield from self._judge(tensor)

    def _judge(self, tensor: TensorFeatures) -> Iterator[Firing]:
        name, norm = tensor.name, tensor.grad_norm
        self._zeros[name] = self._zeros.get(name, 0) + 1 if norm == 0.0 else 0
        if self._zeros[name] >= SAMPLES:
            yield Firing("dead module", Pathology.DEAD_UNITS, name)
        usual, samples = self._norms.get(name, (norm, 0))
        if samples >= WARMUP and norm > EXPLOSION * usual:
            yield Firing("exploding gradient", Pathology.EXPLODING, name)
        if math.isfinite(norm):
            self._norms[name] = DECAY * usual + (1 - DECAY) * norm, samples + 1
        ratio = update_ratio(tensor)
        if ratio < UPDATE[0] or ratio > UPDATE[1]:
            yield Firing("update out of range", Pathology.UPDATE_OUT_OF_RANGE, name)


def depth_slope(tensors: list[TensorFeatures]) -> float:
    """Least-squares slope of the log-norm, per layer back from the output; NaN if not known."""
    logs = [math.log(t.grad_norm) for t in reversed(tensors) if 0.0 < t.grad_norm < math.inf]
    if len(logs) < LEAST_LAYERS:
        return math.nan
    center, mean = (len(logs) - 1) / 2, math.fsum(logs) / len(logs)
    spread = math.fsum((x - center) ** 2 for x in range(len(logs)))
    return math.fsum((x - center) * (y - mean) for x, y in enumerate(logs)) / spread
