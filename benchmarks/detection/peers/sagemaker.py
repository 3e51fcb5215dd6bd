"""Amazon SageMaker Debugger's built-in rules, re-implemented from its developer guide.

Left out: rules for trees, text and images, and the one for poor initialization, which needs the
variance of every layer's weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.detection.peers.rules import Firing, RulePeer, non_finite, update_ratio, vanishing
from benchmarks.detection.records import ActivationFeatures, StepFeatures, TensorFeatures
from lightning_gradguard.diagnose import Pathology

SAVED_EVERY = 500  # as shipped: the rules see what was saved, and that is every 500th step
VANISHING = 1e-7  # of mean |gradient|
LARGE_UPDATE, SMALL_UPDATE = 10.0, 1e-8  # of the update to the weight
LAYER_SHARE = 0.5  # of the units of a layer that are inactive or saturated
LOSS_STEPS = 10  # after which any decrease of the loss is enough


class SageMakerDebugger(RulePeer):
    """All rules on one run.

    Args:
        every: Steps between two checks: 1, or `SAVED_EVERY` as shipped.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__(every)
        self.name = "SageMaker Debugger" + (f", every {every} steps" if every > 1 else "")
        self._reference: tuple[int, float] | None = None

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """NaN, gradients and updates of each tensor, activations, loss."""
        yield from non_finite(features)
        for tensor in features.tensors:
            yield from _judge_tensor(tensor)
        for activation in features.activations:
            yield from _judge_activation(activation)
        if self._loss_did_not_decrease(features.step, features.loss):
            yield Firing("loss does not decrease", Pathology.STAGNATING)

    def _loss_did_not_decrease(self, step: int, loss: float) -> bool:
        if self._reference is None:
            self._reference = step, loss
            return False
        since, before = self._reference
        if step - since < LOSS_STEPS:
            return False
        self._reference = step, loss
        return loss >= before


def _judge_tensor(tensor: TensorFeatures) -> Iterator[Firing]:
    if tensor.mean_abs_grad < VANISHING:
        yield Firing("vanishing gradient", vanishing(tensor.name), tensor.name)
    ratio = update_ratio(tensor)
    if ratio > LARGE_UPDATE:
        yield Firing("update too large", Pathology.UPDATE_OUT_OF_RANGE, tensor.name)
    elif ratio < SMALL_UPDATE:
        yield Firing("update too small", Pathology.UPDATE_OUT_OF_RANGE, tensor.name)


def _judge_activation(activation: ActivationFeatures) -> Iterator[Firing]:
    if activation.kind == "relu" and activation.units_inactive > LAYER_SHARE:
        yield Firing("dead relu", Pathology.DEAD_UNITS, activation.name)
    if activation.kind == "tanh" and activation.inputs_beyond_tanh_limit > LAYER_SHARE:
        yield Firing("saturated", Pathology.SATURATED, activation.name)
