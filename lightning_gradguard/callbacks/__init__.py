"""Lightning callbacks on top of the torch-only guard."""

from __future__ import annotations

from lightning_gradguard.callbacks.gradguard import GradGuard
from lightning_gradguard.callbacks.monitor import GradientMonitor
from lightning_gradguard.callbacks.single import (
    AdaptiveGradientClipping,
    GradientAlert,
    LearningRateBackoff,
    SkipBadSteps,
    UpdateCap,
    WeightRollback,
)

__all__ = [
    "AdaptiveGradientClipping",
    "GradGuard",
    "GradientAlert",
    "GradientMonitor",
    "LearningRateBackoff",
    "SkipBadSteps",
    "UpdateCap",
    "WeightRollback",
]
