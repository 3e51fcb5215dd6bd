"""A model run without a step and without a trace: before training, and where a NaN arose."""

from __future__ import annotations

from lightning_gradguard.dry_run.flight import preflight
from lightning_gradguard.dry_run.non_finite import locate_non_finite
from lightning_gradguard.dry_run.result import Preflight

__all__ = ["Preflight", "locate_non_finite", "preflight"]
