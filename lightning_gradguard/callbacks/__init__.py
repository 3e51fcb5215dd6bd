"""Lightning callbacks on top of the torch-only guard."""

from __future__ import annotations

from lightning_gradguard.callbacks.gradguard import GradGuard
from lightning_gradguard.callbacks.monitor import GradientMonitor

__all__ = ["GradGuard", "GradientMonitor"]
