"""Norms and findings to changes: clipping, the cap on updates, skipping, learning-rate back-off.

What needs torch is imported on first use: what was done in a run can be read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard._lazy import imported_on_use
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
from lightning_gradguard.respond.rollback import WeightRollback
from lightning_gradguard.respond.update_cap import UpdateCap

if TYPE_CHECKING:
    from lightning_gradguard.respond.learning_rate import LearningRateBackoff
    from lightning_gradguard.respond.skipping import SkipBadSteps
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

_MODULE_OF = {
    "LearningRateBackoff": "lightning_gradguard.respond.learning_rate",
    "SkipBadSteps": "lightning_gradguard.respond.skipping",
    "VanishingRegularizer": "lightning_gradguard.respond.vanishing_regularizer",
}


__getattr__ = imported_on_use(__name__, _MODULE_OF)
