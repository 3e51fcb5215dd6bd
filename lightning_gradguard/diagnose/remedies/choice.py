"""Which remedies suit a pathology, best first, what the model lacks before anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_gradguard.diagnose.findings import Finding, Pathology, Remedy
from lightning_gradguard.diagnose.idle_reasons import WORDS, Reason
from lightning_gradguard.diagnose.remedies import catalog
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
        return catalog.check_batch(), catalog.guard_skips()
    if finding.where == "loss" or evidence.get("loss_is_finite") == 0.0:
        return catalog.check_batch(), catalog.safe_loss(), catalog.guard_skips()
    half = catalog.bfloat16(facts) if facts.precision.startswith("16") else None
    return (
        half,
        catalog.guard_skips(),
        catalog.lower_rate(facts),
        catalog.anomaly_detection(),
    )


def _underflow(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        catalog.bfloat16(facts),
        catalog.loss_scaling(facts),
        catalog.float32(facts),
        catalog.raise_rate(facts),
    )


def _dead_units(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        catalog.leaky_relu(finding.where, facts),
        catalog.fresh_layer(finding.where, facts),
        catalog.lower_rate(facts),
    )


def _saturated(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    where = finding.where
    if facts.kinds.get(where) in RECURRENT:
        return (
            catalog.standardized_inputs(facts),
            catalog.orthogonal_recurrence(where, facts),
            catalog.lower_rate(facts),
        )
    inputs = catalog.standardized_inputs(facts) if is_first_activation(where, facts) else None
    return (
        inputs,
        catalog.normalization(facts),
        catalog.xavier_weights(facts),
        catalog.relu_here(where, facts),
        catalog.lower_rate(facts),
    )


def _vanishing_in_depth(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return (
        catalog.relu_instead(facts),
        catalog.normalization(facts),
        catalog.skip_connections(facts),
        catalog.he_weights(facts),
        catalog.kept_scale(),
    )


def _vanishing_in_time(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    """For a finding that brings no reading of its module."""
    return (
        catalog.orthogonal_recurrence(finding.where, facts),
        catalog.raise_rate(facts),
    )


def _not_training(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    path = _path(finding)
    reason = _reason(finding)
    if reason is Reason.NO_OPTIMIZER:
        alone = finding.evidence.get("modules", 1.0) == 1.0
        return (catalog.into_optimizer(path if alone else ""),)
    if reason is Reason.LR_ZERO:
        return (catalog.some_rate(facts),)
    if reason in (Reason.UNCHANGED, Reason.STILL):
        return catalog.float32(facts), catalog.raise_rate(facts)
    if reason is Reason.ZERO_GRADIENT:
        return (
            catalog.leaky_relu(path, facts),
            catalog.fresh_layer(path, facts),
            *_without_gradient(path, facts),
        )
    if reason is Reason.FROZEN:
        return (catalog.unfreeze(path),)
    return _without_gradient(path, facts)


def _without_gradient(path: str, facts: ModelFacts) -> Sequence[Remedy | None]:
    return catalog.keep_graph(path), catalog.list_without_gradient()


def _update_out_of_range(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    path, evidence = _path(finding), finding.evidence
    if "latest" in evidence:  # of the whole model, too slow
        return catalog.adaptive_optimizer(facts), catalog.raise_rate(facts)
    median = evidence.get("median", 0.0)
    if evidence.get("update_ratio", 1.0) < median:
        return (
            catalog.own_rate(path, facts, 10.0),
            catalog.adaptive_optimizer(facts),
            catalog.raise_rate(facts),
        )
    own = catalog.own_rate(path, facts, 0.1) if median else None
    return own, catalog.lower_rate(facts), catalog.guard_bounds()


def _exploding(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    recurrence = catalog.orthogonal_recurrence(finding.where, facts)
    if recurrence is not None:  # in measurements a lower rate alone did not help such a net
        return catalog.guard_bounds(), recurrence, catalog.lower_rate(facts)
    return catalog.lower_rate(facts), catalog.guard_bounds(), catalog.normalization(facts)


def _diverging(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return catalog.lower_rate(facts), catalog.guard_bounds(), catalog.clear_gradients()


def _loss_spike(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return catalog.guard_skips(), catalog.lower_rate(facts), catalog.look_at_batch()


def _oscillating(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    return catalog.lower_rate(facts), catalog.decay_rate(facts), catalog.guard_bounds()


def _stagnating(finding: Finding, facts: ModelFacts) -> Sequence[Remedy | None]:
    usual = _USUAL_RATES.get(facts.optimizer, _USUAL_RATE)
    if facts.lr > 10.0 * usual:
        return catalog.lower_rate(facts), catalog.standardized_inputs(facts)
    return (
        catalog.adaptive_optimizer(facts),
        catalog.raise_rate(facts),
        catalog.standardized_inputs(facts),
    )


def _reason(finding: Finding) -> Reason | None:
    """Why a module does not train: named in the evidence, or else told in the message."""
    named = next((r for r in Reason if finding.evidence.get(r.value)), None)
    return named or next((r for r, words in WORDS.items() if words[2] in finding.message), None)


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
