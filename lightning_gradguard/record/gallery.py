"""Show a run in its loggers, as each of them can, at a bounded cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.record.alert_channels import wandb_runs
from lightning_gradguard.record.logger_images import log_images
from lightning_gradguard.record.pictures import DrawingBudget, Picture, heat_maps
from lightning_gradguard.record.recorder import Recorder
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory, RunInfo
from lightning_gradguard.record.wandb_record import WandbRecord
from lightning_gradguard.respond.actions import Action

logger = logging.getLogger("lightning_gradguard")

# Actions of a kind that are marked one by one between two looks; further ones with the last.
_MARKS = 20

Place = TypeVar("Place")


class _Mark(NamedTuple):
    """An action that waits to be shown, at the step as the loggers count it."""

    step: int
    label: str
    action: Action
    times: int


class Gallery:
    """Hands W&B runs all they can show, and pictures to the other loggers that take some.

    One that fails is told of once and left alone from then on; nothing is raised.

    Args:
        loggers: The loggers of the run, which have begun.
        info: What the run is.
        recorders: One per optimizer.
        step: Tells the step as the loggers count it.
    """

    def __init__(
        self,
        loggers: Sequence[Any],
        info: RunInfo,
        recorders: Sequence[Recorder],
        step: Callable[[], int],
    ) -> None:
        self._step = step
        self._budget = DrawingBudget()
        self._told = False
        # Of each optimizer and kind of action.
        self._marks: dict[tuple[str, str], list[_Mark]] = {}
        self._listening: list[tuple[Recorder, Callable[[Finding | Action], None]]] = []
        # Takes no picture, but tells who would.
        self._others = self._each(list(loggers), lambda one: log_images(one, {}, 0))
        self._wandb = [WandbRecord(run) for run in wandb_runs(loggers)]
        self._wandb = self._each(self._wandb, lambda w: w.start(info))
        if self._wandb:
            for recorder in recorders:
                listener = partial(self._hear, recorder.label)
                recorder.listeners.append(listener)
                self._listening.append((recorder, listener))

    @property
    def _empty(self) -> bool:
        return not (self._wandb or self._others)

    def look(self, read: Callable[[], RunHistory]) -> None:
        """Show the run as it is by now, at a step at which the Trainer logs.

        The whole of it only if enough time has gone by since it was shown last.

        Args:
            read: Reads its history.
        """
        if self._empty:
            return
        self._mark()
        if self._budget.due():
            with self._budget.drawing():
                run = self._read(read)
                if run is not None:
                    self._show(run)

    def close(self, read: Callable[[], RunHistory], report: Path | None) -> None:
        """Show it as it has become, with the report.

        Args:
            read: Reads its history.
            report: Where the HTML report is; ``None`` if there is none.
        """
        for recorder, listener in self._listening:
            recorder.listeners.remove(listener)
        self._listening.clear()
        if self._empty:
            return
        self._mark()
        run = self._read(read)
        if run is not None:
            step = self._step()
            self._show(run)
            self._wandb = self._each(self._wandb, lambda w: w.finish(step, run, report))

    def _hear(self, label: str, event: Finding | Action) -> None:
        """Findings are marked at once; actions wait, as there may be one in every step."""
        step = self._step()
        if isinstance(event, Action):
            waiting = self._marks.setdefault((label, event.kind), [])
            more = waiting.pop().times if len(waiting) == _MARKS else 0
            waiting.append(_Mark(step, label, event, more + 1))
        else:
            self._wandb = self._each(self._wandb, lambda w: w.event(step, event, label))

    def _mark(self) -> None:
        waiting, self._marks = self._marks, {}
        for step, label, action, times in sorted(chain(*waiting.values()), key=lambda m: m.step):
            mark = partial(WandbRecord.event, step=step, event=action, label=label, times=times)
            self._wandb = self._each(self._wandb, mark)

    @staticmethod
    def _read(read: Callable[[], RunHistory]) -> RunHistory | None:
        try:
            return read()
        except ValueError as error:
            logger.warning("The run cannot be shown: %s", error)
            return None

    def _show(self, run: RunHistory) -> None:
        step = self._step()
        for part in run.optimizers:
            self._show_part(part, step)

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
