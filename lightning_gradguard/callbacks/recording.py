"""Keep the history of a run on disk, and report on it at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_gradguard.callbacks.run_facts import now
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record.metrics import depth_within, layer_updates
from lightning_gradguard.record.run_files import REPORT
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory, RunInfo, RunStatus
from lightning_gradguard.record.run_reader import read_run
from lightning_gradguard.record.run_writer import RunWriter

logger = logging.getLogger("lightning_gradguard")

# A view of a run that is under way is about as old; that it is alive is told less often.
_FLUSH_EVERY_SECONDS = 1.0
_TELL_EVERY_SECONDS = 10.0
# A row of a heat map is a pixel or more.
_MOST_LAYERS = 1000


class Recording:
    """Writes the history of a fit, and a report on it at the end.

    What cannot be written is told of once, and tried again with what comes next.

    Args:
        folder: Where to, the run's ``gradguard`` directory.
        info: What the run is.
        engines: One per optimizer.
        report: Whether to write the report.
        resumed: Whether the run goes on from a checkpoint.
        clock: Seconds, from any start.
    """

    def __init__(
        self,
        folder: Path,
        info: RunInfo,
        engines: Sequence[GuardEngine],
        *,
        report: bool,
        resumed: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._info = info
        self._engines = engines
        self._report = report
        self._clock = clock
        self._writer = RunWriter(folder, info, resumed=resumed)
        self._complained = False
        self._flushed = self._told = clock()
        nothing = dict.fromkeys(range(len(engines)), -1)
        self._rows, self._times, self._looks, self._norms = (dict(nothing) for _ in range(4))
        self._depths: dict[int, int | None] = {}

    def logged(self) -> None:
        """Take in the layers, at a step at which the Trainer logs."""
        for number, engine in enumerate(self._engines):
            norms, step = engine.last_norms, engine.last_norms_step
            if norms is None or not engine.active or step <= self._norms[number]:
                continue
            self._norms[number] = step
            if number not in self._depths:
                self._depths[number] = depth_within(norms.names, _MOST_LAYERS)
            depth, label = self._depths[number], engine.recorder.label
            self._writer.layers(label, step, norms.layers(depth))
            look = engine.recorder.inspection
            if look is not None and look.step > self._looks[number]:
                self._looks[number] = look.step
                self._writer.updates(label, look.step, layer_updates(look, depth))

    def tick(self) -> None:
        """Hand what has happened to the operating system, now and then."""
        if self._clock() - self._flushed >= _FLUSH_EVERY_SECONDS:
            self._write("running")

    def close(self, status: RunStatus, error: str = "") -> Path | None:
        """Write the rest and the report.

        Args:
            status: How the run ended, see :class:`RunInfo`.
            error: Its exception, if it failed.

        Returns:
            Where the report is; ``None`` if there is none.
        """
        self._write(status, error)
        try:
            self._writer.close()
            return self._write_report() if self._report else None
        except (OSError, ValueError) as failure:
            self._complain(failure)
            return None

    def read(self) -> RunHistory:
        """The run so far.

        Raises:
            ValueError: If it cannot be read.
        """
        run = read_run(self._folder)
        parts = {engine.recorder.label: engine for engine in self._engines}
        known = [_as_known(part, parts[part.label]) for part in run.optimizers]
        return replace(run, optimizers=tuple(known))

    def _write(self, status: RunStatus, error: str = "") -> None:
        self._flushed = self._clock()
        rows = {n: e.recorder.history_since(self._rows[n]) for n, e in enumerate(self._engines)}
        times = {n: e.recorder.readings_since(self._times[n]) for n, e in enumerate(self._engines)}
        for number, engine in enumerate(self._engines):
            self._writer.steps(engine.recorder.label, rows[number])
            self._writer.times(engine.recorder.label, times[number])
        try:
            self._writer.flush()
            self._tell(status, error)
        except OSError as failure:  # a full disk is no reason to leave the run unguarded
            self._complain(failure)
            return
        self._rows |= {number: new[-1].step for number, new in rows.items() if new}
        self._times |= {number: new[-1].step for number, new in times.items() if new}

    def _tell(self, status: RunStatus, error: str) -> None:
        """How the run is; not as often as what it does, as it takes the place of a file."""
        if status == "running" and self._flushed - self._told < _TELL_EVERY_SECONDS:
            return
        self._told = self._flushed
        facts = zip(self._info.optimizers, self._engines, strict=True)
        self._writer.update(
            replace(
                self._info,
                status=status,
                error=error,
                updated=now(),
                optimizers=tuple({**fact, "counts": engine.counts} for fact, engine in facts),
            )
        )

    def _write_report(self) -> Path | None:
        from lightning_gradguard.record.html_report import write_report

        run = self.read()
        if not any(len(part.steps["step"]) for part in run.optimizers):
            return None
        path = write_report(run, self._folder / REPORT)
        logger.info("The report of the run is in %s.", path)
        return path

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            logger.error(
                "The history of the run cannot be kept in %s (%s); training goes on guarded.",
                self._folder,
                error,
            )


def _as_known(part: OptimizerHistory, engine: GuardEngine) -> OptimizerHistory:
    """Of what could not be written down, memory has more."""
    recorder = engine.recorder
    if recorder.events is not None:
        return part
    found, done = tuple(recorder.findings), tuple(recorder.actions)
    return replace(part, findings=found, actions=done, counts=engine.counts)
