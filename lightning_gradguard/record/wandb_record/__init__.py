"""What W&B shows of a run; imported by its own path, as only its users have ``wandb``."""

from __future__ import annotations

from lightning_gradguard.record.wandb_record.record import WandbRecord

__all__ = ["WandbRecord"]
