"""Norms and findings to changes: clipping, the cap on updates, skipping, learning-rate back-off."""

from __future__ import annotations

from lightning_gradguard.respond.actions import Action, ActionKind
from lightning_gradguard.respond.clipping import AdaptiveClip
from lightning_gradguard.respond.learning_rate import LearningRateBackoff
from lightning_gradguard.respond.skipping import SkipBadSteps
from lightning_gradguard.respond.update_cap import UpdateCap

__all__ = [
    "Action",
    "ActionKind",
    "AdaptiveClip",
    "LearningRateBackoff",
    "SkipBadSteps",
    "UpdateCap",
]
