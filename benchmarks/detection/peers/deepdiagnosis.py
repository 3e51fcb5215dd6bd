"""DeepDiagnosis' rules (ICSE 2022), re-implemented from their description."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.detection.peers.rules import Firing, RulePeer, non_finite, vanishing
from benchmarks.detection.records import ActivationFeatures, StepFeatures, TensorFeatures
from lightning_gradguard.diagnose import Pathology

VANISHING = 1e-7  # of mean |gradient|
DEAD_SHARE = 0.7  # of the outputs at or below zero
SATURATED_SHARE = 0.5  # of the inputs beyond 5
UPDATE = (1e-5, 0.1)  # of lr times gradient norm to weight norm


class DeepDiagnosis(RulePeer):
    """All rules on one run."""

    name = "DeepDiagnosis"

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """NaN, activations, then gradients and updates of each tensor."""
        yield from non_finite(features)
        for activation in features.activations:
            yield from _judge_activation(activation)
        for tensor in features.tensors:
            if tensor.mean_abs_grad < VANISHING:
                yield Firing("vanishing gradient", vanishing(tensor.name), tensor.name)
            if _is_out_of_range(tensor, features.lr):
                yield Firing("update out of range", Pathology.UPDATE_OUT_OF_RANGE, tensor.name)


def _judge_activation(activation: ActivationFeatures) -> Iterator[Firing]:
    if activation.kind == "relu" and activation.share_not_above_zero >= DEAD_SHARE:
        yield Firing("dead node", Pathology.DEAD_UNITS, activation.name)
    bounded = activation.kind in ("tanh", "sigmoid")
    if bounded and activation.inputs_beyond_5 > SATURATED_SHARE:
        yield Firing("saturated", Pathology.SATURATED, activation.name)


def _is_out_of_range(tensor: TensorFeatures, lr: float) -> bool:
    if not tensor.is_weight or not tensor.weight_norm > 0.0:
        return False
    ratio = lr * tensor.grad_norm / tensor.weight_norm
    return ratio < UPDATE[0] or ratio > UPDATE[1]
