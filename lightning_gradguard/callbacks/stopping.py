"""What is left behind by a run that was asked to stop: a checkpoint and the report."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_gradguard.callbacks.results import Results
from lightning_gradguard.respond import ActionKind

logger = logging.getLogger("lightning_gradguard")


class StoppedRun:
    """Saves a checkpoint and the report, once, when an engine asks its run to stop.

    Args:
        folder: Where to; ``None`` to save nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._saved = False

    def save(self, trainer: Trainer, results: Results) -> None:
        """Save ``stopped-step=<N>.ckpt`` and ``.txt``; every rank comes here at the same step.

        A failure is reported and no more: the run is about to end, and what it has must not be
        lost.
        """
        if self._saved or not any(engine.should_stop for engine in results.engines):
            return
        self._saved = True
        if self._folder is None:
            return
        stops = [action.step for action in results.actions if action.kind is ActionKind.STOP]
        checkpoint = self._folder / f"stopped-step={max(stops, default=trainer.global_step)}.ckpt"
        report = checkpoint.with_suffix(".txt")
        try:
            _save_checkpoint(trainer, checkpoint)
            if trainer.is_global_zero:
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text(f"{results.report()}\n", encoding="utf-8")
        except Exception as error:  # noqa: BLE001 - whatever it is, the run ends in its own way
            logger.error(  # noqa: TRY400 - the reason says it all
                "What is left of the stopped run cannot be saved in %s (%s: %s).",
                self._folder,
                type(error).__name__,
                error,
            )
            return
        if trainer.is_global_zero:
            logger.warning(
                "The run is asked to stop: its state is in %s, the report in %s.",
                checkpoint,
                report,
            )


def _save_checkpoint(trainer: Trainer, path: Path) -> None:
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except Exception:
        # The other ranks wait for this one where it would have come to next.
        trainer.strategy.barrier("Trainer.save_checkpoint")
        raise
