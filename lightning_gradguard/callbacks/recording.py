"""Keep what a run has to show: on disk, in its loggers, as a report at its end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_gradguard.callbacks.gallery import Gallery
from lightning_gradguard.callbacks.run_facts import now
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record.metrics import depth_within, layer_updates
from lightning_gradguard.record.run_history import RunInfo, RunStatus
from lightning_gradguard.record.run_reader import read_run
from lightning_gradguard.record.run_writer import RunWriter

logger = logging.getLogger("lightning_gradguard")

# A view of a run that is under way is never older.
_FLUSH_EVERY_SECONDS = 1.0
# A row of a heat map is a pixel or more.
_MOST_LAYERS = 1000


class Recording:
    """Writes the history of a fit, shows it in the run's loggers and reports on it at the end.

    An error of its own is told once, and ends nothing but this.

    Args:
        folder: Where to, the run's ``gradguard`` directory.
        info: What the run is.
        engines: One per optimizer.
        gallery: Shows pictures of it; ``None`` for none.
        report: Whether to write ``report.html`` at the end.
        resumed: Whether the run goes on from a checkpoint.
        clock: Seconds, from any start.
    """

    def __init__(
        self,
        folder: Path,
        info: RunInfo,
        engines: Sequence[GuardEngine],
        gallery: Gallery | None,
        *,
        report: bool,
        resumed: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._info = info
        self._engines = engines
        self._gallery = gallery
        self._report = report
        self._clock = clock
        self._writer: RunWriter | None = RunWriter(folder, info, resumed=resumed)
        self._flushed = clock()
        self._last_row = dict.fromkeys(range(len(engines)), -1)
        self._last_time = dict(self._last_row)
        self._last_look = dict(self._last_row)
        self._depths: dict[int, int | None] = {}

    def logged(self) -> None:
        """Take in the layers, at a step at which the Trainer logs."""
        for number, engine in enumerate(self._engines):
            row, norms, label = engine.recorder.last, engine.last_norms, engine.recorder.label
            if self._writer is None or row is None or norms is None or not engine.active:
                continue
            if number not in self._depths:
                self._depths[number] = depth_within(norms.names, _MOST_LAYERS)
            depth = self._depths[number]
            self._writer.layers(label, row.step, norms.layers(depth))
            look = engine.recorder.inspection
            if look is not None and look.step > self._last_look[number]:
                self._last_look[number] = look.step
                self._writer.updates(label, look.step, layer_updates(look, depth))
        if self._gallery is not None:
            self._gallery.look(lambda: read_run(self._folder))

    def tick(self) -> None:
        """Hand what has happened to the operating system, now and then."""
        time_now = self._clock()
        if time_now - self._flushed >= _FLUSH_EVERY_SECONDS:
            self._flushed = time_now
            self._write("running")

    def close(self, status: RunStatus, error: str = "") -> None:
        """Write the rest and the report.

        Args:
            status: How the run ended, see :class:`RunInfo`.
            error: Its exception, if it failed.
        """
        self._write(status, error)
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
            report = self._write_report()
        except (OSError, ValueError) as failure:
            self._give_up(failure)
            report = None
        if self._gallery is not None:
            self._gallery.close(lambda: read_run(self._folder), report)

    def _write(self, status: RunStatus, error: str = "") -> None:
        if self._writer is None:
            return
        try:
            for number, engine in enumerate(self._engines):
                self._take(number, engine)
            self._writer.flush()
            self._info = replace(
                self._info,
                status=status,
                error=error,
                updated=now(),
                optimizers=tuple(
                    {**facts, "counts": engine.counts}
                    for facts, engine in zip(self._info.optimizers, self._engines, strict=True)
                ),
            )
            self._writer.update(self._info)
        except OSError as failure:
            self._give_up(failure)

    def _take(self, number: int, engine: GuardEngine) -> None:
        recorder, writer = engine.recorder, self._writer
        if writer is None:
            return
        rows = recorder.history_since(self._last_row[number])
        if rows:
            self._last_row[number] = rows[-1].step
            writer.steps(recorder.label, rows)
        readings = recorder.readings_since(self._last_time[number])
        if readings:
            self._last_time[number] = readings[-1].step
            writer.times(recorder.label, readings)

    def _write_report(self) -> Path | None:
        if not self._report:
            return None
        from lightning_gradguard.record.html_report import write_report

        run = read_run(self._folder)
        if not any(len(part.steps["step"]) for part in run.optimizers):
            return None
        path = write_report(run, self._folder / "report.html")
        logger.info("The report of the run is in %s.", path)
        return path

    def _give_up(self, error: Exception) -> None:
        # A full disk is no reason to leave the run unguarded.
        writer, self._writer = self._writer, None
        logger.error(
            "The history of the run cannot be kept in %s (%s); training goes on guarded, without "
            "it.",
            self._folder,
            error,
        )
        if writer is not None:
            with contextlib.suppress(OSError):  # what cannot be written has just been told
                writer.close()
