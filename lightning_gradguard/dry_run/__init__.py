"""A few batches before training, with every measurement and without a trace."""

from __future__ import annotations

from lightning_gradguard.dry_run.flight import preflight
from lightning_gradguard.dry_run.result import Preflight

__all__ = ["Preflight", "preflight"]
