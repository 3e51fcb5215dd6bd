"""Which remedies suit a pathology, best first, what the model lacks before anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_gradguard.diagnose.findings import Finding, Pathology, Remedy
from lightning_gradguard.diagnose.idle_reasons import Reason
from lightning_gradguard.diagnose.remedies import layer_remedies as layers
from lightning_gradguard.diagnose.remedies import step_remedies as steps
from lightning_gradguard.diagnose.remedies.model_layers import (
    RECURRENT,
    is_first_activation,
)
from lightning_gradguard.readings import ModelFacts

# Rates that torch's own examples start from: that of SGD, and that of optimizers whose step does
# not depend on the size of the gradient. A stuck run far above it jumps over what it looks for.
_USUAL_RATES = {"SGD": 0.1, "ASGD": 0.1}
_USUAL_RATE = 1e-3

Choice = Callable[[Finding, ModelFacts], Sequence[Remedy | None]]


def _non_finite(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    evidence = finding.evidence
    if evidence.get("batch"):
        return steps.check_batch(), _unless_guarded(steps.guard_skips(), facts)
    if finding.where == "loss" or evidence.get("loss_is_finite") == 0.0:
        return steps.check_batch(), steps.safe_loss(), _unless_guarded(steps.guard_skips(), facts)
    half = steps.bfloat16(facts) if facts.precision.startswith("16") else None
    return (
        half,
        _unless_guarded(steps.guard_skips(), facts),
        steps.lower_rate(facts),
        steps.anomaly_detection(),
    )


def _underflow(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        steps.bfloat16(facts),
        steps.loss_scaling(facts),
        steps.float32(facts),
        steps.raise_rate(facts),
    )


def _dead_units(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        layers.leaky_relu(finding.where, facts),
        layers.fresh_layer(finding.where, facts),
        steps.lower_rate(facts),
    )


def _saturated(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    where = finding.where
    if facts.kinds.get(where) in RECURRENT:
        return (
            steps.standardized_inputs(facts),
            layers.orthogonal_recurrence(where, facts),
            steps.lower_rate(facts),
        )
    inputs = steps.standardized_inputs(facts) if is_first_activation(where, facts) else None
    return (
        inputs,
        layers.normalization(facts),
        layers.xavier_weights(facts),
        layers.relu_here(where, facts),
        steps.lower_rate(facts),
    )


def _vanishing_in_depth(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        layers.relu_instead(facts),
        layers.normalization(facts),
        layers.skip_connections(facts),
        layers.he_weights(facts),
        layers.kept_scale(),
    )


def _vanishing_in_time(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    """For a finding that brings no reading of its module."""
    return (
        layers.orthogonal_recurrence(finding.where, facts),
        steps.raise_rate(facts),
    )


def _not_training(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    path = _path(finding)
    reason = _reason(finding)
    if reason is Reason.NO_OPTIMIZER:
        alone = finding.evidence.get("modules", 1.0) == 1.0
        place = path if alone else ""
        return layers.into_optimizer(place), layers.freeze(place)
    if reason is Reason.NO_GRAD and path:  # as a teacher runs whose parameters were not left out
        return layers.keep_graph(path), layers.freeze(path), layers.list_without_gradient()
    if reason is Reason.LR_ZERO:
        return (steps.some_rate(facts),)
    if reason in (Reason.UNCHANGED, Reason.STILL):
        return steps.float32(facts), steps.raise_rate(facts)
    if reason is Reason.ZERO_GRADIENT:
        return (
            layers.leaky_relu(path, facts),
            layers.fresh_layer(path, facts),
            steps.lower_rate(facts),
        )
    if reason is Reason.FROZEN:
        return (layers.unfreeze(path),)
    return _without_gradient(path, facts)


def _without_gradient(path: str, facts: ModelFacts) -> Sequence[Remedy | None]:
    return layers.keep_graph(path), layers.list_without_gradient()


def _update_out_of_range(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    path, evidence = _path(finding), finding.evidence
    if "latest" in evidence:  # of the whole model, too slow
        if _is_far_above_usual(facts):  # for what such a rate has made of the weights
            return steps.lower_rate(facts), steps.standardized_inputs(facts)
        return steps.adaptive_optimizer(facts), steps.raise_rate(facts)
    median = evidence.get("median", 0.0)
    if evidence.get("update_ratio", 1.0) < median:
        return (
            steps.own_rate(path, facts, 10.0),
            steps.adaptive_optimizer(facts),
            steps.raise_rate(facts),
        )
    own = steps.own_rate(path, facts, 0.1) if median else None
    return own, steps.lower_rate(facts), _unless_guarded(steps.guard_bounds(), facts)


def _exploding(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    recurrence = layers.orthogonal_recurrence(finding.where, facts)
    if recurrence is not None:  # in measurements a lower rate alone did not help such a net
        return _unless_guarded(steps.guard_bounds(), facts), recurrence, steps.lower_rate(facts)
    return (
        steps.lower_rate(facts),
        _unless_guarded(steps.guard_bounds(), facts),
        layers.normalization(facts),
    )


def _diverging(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        steps.lower_rate(facts),
        _unless_guarded(steps.guard_bounds(), facts),
        steps.clear_gradients(),
    )


def _loss_spike(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        _unless_guarded(steps.guard_skips(), facts),
        steps.lower_rate(facts),
        steps.look_at_batch(),
    )


def _oscillating(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        steps.lower_rate(facts),
        steps.decay_rate(facts),
        _unless_guarded(steps.guard_bounds(), facts),
    )


def _stagnating(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    if _is_far_above_usual(facts):
        return steps.lower_rate(facts), steps.standardized_inputs(facts)
    return (
        steps.adaptive_optimizer(facts),
        steps.raise_rate(facts),
        steps.standardized_inputs(facts),
    )


def _is_far_above_usual(facts: ModelFacts) -> bool:
    return facts.lr > 10.0 * _USUAL_RATES.get(facts.optimizer, _USUAL_RATE)


def _unless_guarded(remedy: Remedy, facts: ModelFacts) -> Remedy | None:
    return None if facts.guarded else remedy


def _reason(finding: Finding) -> Reason | None:
    """Why a module does not train, as the evidence names it."""
    return next((reason for reason in Reason if finding.evidence.get(reason.value)), None)


def _path(finding: Finding) -> str:
    """The module's path; empty for the root, which findings call the model."""
    return "" if finding.where in ("model", "loss") else finding.where


CHOICES: Mapping[Pathology, Choice] = {
    Pathology.NON_FINITE: _non_finite,
    Pathology.UNDERFLOW: _underflow,
    Pathology.DEAD_UNITS: _dead_units,
    Pathology.LAYER_NOT_TRAINING: _not_training,
    Pathology.SATURATED: _saturated,
    Pathology.VANISHING_IN_TIME: _vanishing_in_time,
    Pathology.VANISHING_IN_DEPTH: _vanishing_in_depth,
    Pathology.UPDATE_OUT_OF_RANGE: _update_out_of_range,
    Pathology.EXPLODING: _exploding,
    Pathology.DIVERGING: _diverging,
    Pathology.LOSS_SPIKE: _loss_spike,
    Pathology.OSCILLATING: _oscillating,
    Pathology.STAGNATING: _stagnating,
}
