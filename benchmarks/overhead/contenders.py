"""What is added to a Trainer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from benchmarks.overhead.peers import AdaptiveGradientClipping, AutoClip, GradNormLogger
from lightning_gradguard import GradGuard, GradientMonitor

# Lightning's own default; what is logged at an interval is logged at this one by everybody.
LOG_EVERY_N_STEPS = 50

BARE = "bare"


@dataclass(frozen=True)
class Contender:
    """One way to set up a Trainer.

    Args:
        name: For tables.
        options: Builds the options of the Trainer that it adds, for a model and a directory.
        package: What has to be installed for it.
        cheap: Whether it is also measured where a step takes long.
    """

    name: str
    options: Callable[[LightningModule, Path], dict[str, Any]]
    package: str | None = None
    cheap: bool = True

    @property
    def installed(self) -> bool:
        """Whether it can run here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def make_trainer(self, module: LightningModule, directory: Path, device: str) -> Trainer:
        """A quiet Trainer that differs from the bare one by this contender only."""
        options = {"logger": CSVLogger(directory / "csv"), **self.options(module, directory)}
        return Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            log_every_n_steps=LOG_EVERY_N_STEPS,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            **options,
        )


def _zclip(module: LightningModule, directory: Path) -> dict[str, Any]:
    from zclip import ZClipLightningCallback

    return {"callbacks": [ZClipLightningCallback()]}


def _wandb_watch(module: LightningModule, directory: Path) -> dict[str, Any]:
    logger = WandbLogger(save_dir=directory, offline=True, project="overhead")
    logger.watch(module, log="gradients", log_freq=LOG_EVERY_N_STEPS, log_graph=False)
    return {"logger": logger}


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(BARE, lambda module, directory: {}),
        Contender("gradient_clip_val", lambda module, directory: {"gradient_clip_val": 1.0}),
        Contender("ZClip", _zclip, package="zclip"),
        Contender("AutoClip", lambda module, directory: {"callbacks": [AutoClip()]}, cheap=False),
        Contender(
            "AGC",
            lambda module, directory: {"callbacks": [AdaptiveGradientClipping()]},
            cheap=False,
        ),
        Contender(
            "grad_norm", lambda module, directory: {"callbacks": [GradNormLogger()]}, cheap=False
        ),
        Contender("WandbLogger.watch", _wandb_watch, package="wandb", cheap=False),
        Contender(
            "detect_anomaly", lambda module, directory: {"detect_anomaly": True}, cheap=False
        ),
        Contender("GradientMonitor", lambda module, directory: {"callbacks": [GradientMonitor()]}),
        Contender(
            "GradGuard without history",
            lambda module, directory: {"callbacks": [GradGuard(history=False, report=False)]},
        ),
        Contender("GradGuard", lambda module, directory: {"callbacks": [GradGuard()]}),
    )
}


def finish_wandb() -> None:
    """End the run that ``WandbLogger`` began, so that the next one starts afresh."""
    if importlib.util.find_spec("wandb") is not None:
        import wandb

        if wandb.run is not None:
            wandb.finish()
