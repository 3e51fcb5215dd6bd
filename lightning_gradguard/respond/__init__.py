"""Norms and findings to changes: clipping, the cap on updates, skipping, learning-rate back-off."""

from __future__ import annotations

from lightning_gradguard.respond.actions import Action, ActionKind
from lightning_gradguard.respond.clipping import (
    AGC,
    AdaptiveClip,
    ClipStrategy,
    NormClip,
    PercentileClip,
    ValueClip,
    ZScoreClip,
)
from lightning_gradguard.respond.layer_boost import LayerBoost
from lightning_gradguard.respond.learning_rate import LearningRateBackoff
from lightning_gradguard.respond.rollback import WeightRollback
from lightning_gradguard.respond.skipping import SkipBadSteps
from lightning_gradguard.respond.update_cap import UpdateCap
from lightning_gradguard.respond.vanishing_regularizer import VanishingRegularizer

__all__ = [
    "AGC",
    "Action",
    "ActionKind",
    "AdaptiveClip",
    "ClipStrategy",
    "LayerBoost",
    "LearningRateBackoff",
    "NormClip",
    "PercentileClip",
    "SkipBadSteps",
    "UpdateCap",
    "ValueClip",
    "VanishingRegularizer",
    "WeightRollback",
    "ZScoreClip",
]
