"""TheDeepChecker's rules on a running training (TOSEM 2022), re-implemented from their description.

Saturation is judged on the mean of a layer instead of each unit. The length of a period of the
loss is not given in steps: a tenth of the budget is a kind choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.detection.peers.rules import Firing, RulePeer, non_finite, update_ratio, vanishing
from benchmarks.detection.records import ActivationFeatures, StepFeatures, TensorFeatures
from lightning_gradguard.diagnose import Pathology

VANISHING, EXPLODING = 1e-6, 1e6  # of mean |gradient|
SHRINKING, GROWING = 0.5, 2.0  # factor per check that counts ...
TIMES = 4  # ... if it comes so often running
DEAD_SHARE = 0.5  # of the units of a layer
SATURATION = 0.85
LOG_UPDATE = (-4.0, -1.0)  # log10 of the update to the weight
LOSS_FALL = 0.05  # per period
PERIODS = 10  # in a run


class TheDeepChecker(RulePeer):
    """All rules on one run.

    Args:
        steps: Budget of the run.
    """

    name = "TheDeepChecker"

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._period = max(steps // PERIODS, 1)
        self._losses: list[float] = []
        self._before = math.nan
        self._grads: dict[str, float] = {}
        self._shrinks: dict[str, int] = {}
        self._grows: dict[str, int] = {}

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """NaN, gradients and updates of each tensor, activations, loss."""
        yield from non_finite(features)
        for tensor in features.tensors:
            yield from self._judge_gradient(tensor)
            yield from _judge_update(tensor)
        for activation in features.activations:
            yield from _judge_activation(activation)
        if self._loss_hardly_falls(features.loss):
            yield Firing("loss hardly falls", Pathology.STAGNATING)

    def _judge_gradient(self, tensor: TensorFeatures) -> Iterator[Firing]:
        name, grad = tensor.name, tensor.mean_abs_grad
        if math.isnan(grad):
            return
        before = self._grads.get(name, math.nan)
        self._grads[name] = grad
        self._shrinks[name] = self._shrinks.get(name, 0) + 1 if grad <= SHRINKING * before else 0
        self._grows[name] = self._grows.get(name, 0) + 1 if grad >= GROWING * before else 0
        if grad < VANISHING or self._shrinks[name] >= TIMES:
            yield Firing("vanishing gradient", vanishing(name), name)
        if grad > EXPLODING or (self._grows[name] >= TIMES and before > 0.0):
            yield Firing("exploding gradient", Pathology.EXPLODING, name)

    def _loss_hardly_falls(self, loss: float) -> bool:
        self._losses.append(loss)
        if len(self._losses) < self._period:
            return False
        before, self._before = self._before, math.fsum(self._losses) / len(self._losses)
        self._losses = []
        return before - self._before < LOSS_FALL * abs(before)


def _judge_update(tensor: TensorFeatures) -> Iterator[Firing]:
    ratio = update_ratio(tensor)
    if not tensor.is_weight or math.isnan(ratio):
        return
    low, high = LOG_UPDATE
    if not low <= (math.log10(ratio) if ratio > 0.0 else -math.inf) <= high:
        yield Firing("update out of range", Pathology.UPDATE_OUT_OF_RANGE, tensor.name)


def _judge_activation(activation: ActivationFeatures) -> Iterator[Firing]:
    if activation.kind == "relu" and activation.units_below_percentile > DEAD_SHARE:
        yield Firing("dead units", Pathology.DEAD_UNITS, activation.name)
    if activation.saturation > SATURATION:
        yield Firing("saturated units", Pathology.SATURATED, activation.name)
