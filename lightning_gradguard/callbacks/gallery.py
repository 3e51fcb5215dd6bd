"""Show a run in its loggers, as each of them can, at a bounded cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Trainer

from lightning_gradguard.callbacks.alerting import wandb_runs
from lightning_gradguard.callbacks.surroundings import logged_step
from lightning_gradguard.diagnose import Finding
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record import Recorder
from lightning_gradguard.record.logger_images import log_images
from lightning_gradguard.record.pictures import DrawingBudget, Picture, heat_maps
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory, RunInfo
from lightning_gradguard.record.wandb_record import WandbRecord
from lightning_gradguard.respond.actions import Action

logger = logging.getLogger("lightning_gradguard")

Place = TypeVar("Place")


class Gallery:
    """Hands W&B runs all they can show, and pictures to the other loggers that take some.

    One that fails is told of once and left alone from then on.

    Args:
        trainer: Training has started, so that its loggers have begun their runs.
        info: What the run is.
        engines: One per optimizer.
    """

    def __init__(self, trainer: Trainer, info: RunInfo, engines: Sequence[GuardEngine]) -> None:
        self._trainer = trainer
        self._budget = DrawingBudget()
        self._told = False
        self._wandb = [WandbRecord(run) for run in wandb_runs(trainer)]
        self._others = list(trainer.loggers)
        self._listening: list[tuple[Recorder, Callable[[Finding | Action], None]]] = []
        # Takes no picture, but tells who would.
        self._others = self._each(self._others, lambda one: log_images(one, {}, 0))
        self._wandb = self._each(self._wandb, lambda w: w.start(info))
        if self._wandb:
            for engine in engines:
                listener = partial(self._event, engine.recorder.label)
                engine.recorder.listeners.append(listener)
                self._listening.append((engine.recorder, listener))

    @property
    def _empty(self) -> bool:
        return not (self._wandb or self._others)

    def look(self, read: Callable[[], RunHistory]) -> None:
        """Show the run as it is by now, if enough time has gone by since it was shown last.

        Args:
            read: Reads its history.
        """
        if not self._empty and self._budget.due():
            with self._budget.drawing():
                self._show(read())

    def close(self, read: Callable[[], RunHistory], report: Path | None) -> None:
        """Show it as it has become, with the report.

        Args:
            read: Reads its history.
            report: Where the HTML report is; ``None`` if there is none.
        """
        for recorder, listener in self._listening:
            recorder.listeners.remove(listener)
        self._listening.clear()
        if not self._empty:
            run, step = read(), logged_step(self._trainer)
            self._show(run)
            self._wandb = self._each(self._wandb, lambda w: w.finish(step, run, report))

    def _event(self, label: str, event: Finding | Action) -> None:
        step = logged_step(self._trainer)
        self._wandb = self._each(self._wandb, lambda w: w.event(step, event, label))

    def _show(self, run: RunHistory) -> None:
        for part in run.optimizers:
            self._show_part(part, logged_step(self._trainer))

    def _show_part(self, part: OptimizerHistory, step: int) -> None:
        pictures = self._pictures(part)
        self._others = self._each(self._others, lambda one: log_images(one, pictures, step))
        self._wandb = self._each(self._wandb, lambda w: w.show(step, part, pictures))

    def _pictures(self, part: OptimizerHistory) -> dict[str, Picture]:
        try:
            return heat_maps(part)
        except ModuleNotFoundError:
            if not self._told:
                self._told = True
                logger.info("Heat maps need matplotlib: pip install 'lightning-gradguard[report]'")
            return {}

    @staticmethod
    def _each(places: Sequence[Place], show: Callable[[Place], bool | None]) -> list[Place]:
        """Show something in each place; returns those that neither failed nor said ``False``."""
        return [place for place in places if _shows(place, show)]


def _shows(place: Place, show: Callable[[Place], bool | None]) -> bool:
    try:
        return show(place) is not False
    except Exception as error:  # noqa: BLE001 - no reason to end a run
        logger.warning("%s is shown no more of the run: %s", type(place).__name__, error)
        return False
