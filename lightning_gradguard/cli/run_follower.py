"""Follows a run on disk while it is written, at a cost that does not grow with the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_gradguard.cli.progress import Seen, SpeedMeter, steps_taken
from lightning_gradguard.cli.tail import Appended, Tail, state_of
from lightning_gradguard.diagnose import Finding
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.events import events_in
from lightning_gradguard.record.past_events import past_actions, past_findings
from lightning_gradguard.record.run_files import INFO, STEPS, TIMESTEPS, folder_of
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory, RunInfo
from lightning_gradguard.record.run_reader import RunError, events_path, history_folder, read_info
from lightning_gradguard.record.table_file import csv_line, read_columns
from lightning_gradguard.record.table_rows import steps_of, times_of
from lightning_gradguard.respond.actions import Action

# Bytes: more than a line of any step takes, and of a reading through 256 bins a few hundred.
_LONGEST_STEP = 120
_TIMES_BYTES = 1_000_000


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(timezone.utc)


class RunFollower:
    """Looks at a run again and again, and reads only what has been added since.

    It keeps the last steps, the newest reading of each module, and all findings and actions; layers
    it does not read.

    Args:
        directory: As for :func:`~lightning_gradguard.record.run_reader.read_run`.
        window: How many steps it keeps, of each optimizer.
        clock: Tells the time, with its zone.

    Raises:
        RunError: If there is no run, or one that this version cannot read.

    Example:
        >>> RunFollower(Path("no/such/place"))
        Traceback (most recent call last):
            ...
        lightning_gradguard.record.run_reader.RunError: no/such/place does not exist
    """

    def __init__(
        self, directory: Path, window: int = 500, clock: Callable[[], datetime] = now
    ) -> None:
        self.folder = history_folder(directory)
        self._window = window
        self._clock = clock
        self._info = RunInfo()
        self._known: tuple[int, ...] = ()
        self._log = Tail(events_path(self.folder))
        self._events: list[dict[str, Any]] = []
        self._told: dict[str, _Told] = {}
        self._tables: dict[str, _Tables] = {}
        self._speed = SpeedMeter()

    def look(self) -> Seen:
        """The run as it is now.

        Raises:
            RunError: If it is there no more, or cannot be read.
        """
        try:
            self._read_info()
            self._read_events()
            labels = [str(part.get("label", "")) for part in self._info.optimizers] or [""]
            run = RunHistory(self._info, tuple(map(self._part, labels)), self.folder)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be read any more ({error.strerror})") from error
        written = max(self._tables[label].written for label in labels)
        return Seen(run, self._clock(), self._speed.of(written, steps_taken(run)))

    def _read_info(self) -> None:
        if not self.folder.parent.is_dir():
            raise RunError(f"{self.folder.parent} is there no more")
        try:
            known = state_of((self.folder / INFO).stat())
        except FileNotFoundError:  # between two runs in the same directory
            return
        if known != self._known:
            self._info, self._known = read_info(self.folder), known

    def _read_events(self) -> None:
        new = self._log.poll()
        if new is not None:
            self._told.clear()
            self._events = [*([] if new.afresh else self._events), *events_in(new.lines)]

    def _part(self, label: str) -> OptimizerHistory:
        if label not in self._told:
            own = [event for event in self._events if event.get("optimizer", "") == label]
            self._told[label] = _Told(past_findings(own), past_actions(own))
        if label not in self._tables:
            self._tables[label] = _Tables(self.folder / folder_of(label), self._window)
        tables, told = self._tables[label], self._told[label]
        tables.read()
        facts = next((p for p in self._info.optimizers if p.get("label", "") == label), {})
        return OptimizerHistory(
            label=label,
            steps=tables.steps,
            times=tuple(tables.times.values()),
            findings=told.findings,
            actions=told.actions,
            counts=facts.get("counts", {}),
        )


@dataclass(frozen=True)
class _Told:
    findings: tuple[Finding, ...]
    actions: tuple[Action, ...]


class _Tables:
    """The ends of the tables of one optimizer.

    Args:
        folder: Where they lie.
        window: How many steps are kept.
    """

    def __init__(self, folder: Path, window: int) -> None:
        self._steps = Tail(folder / STEPS, window * _LONGEST_STEP)
        self._times = Tail(folder / TIMESTEPS, _TIMES_BYTES)
        self._lines: deque[bytes] = deque(maxlen=window)
        self._columns: dict[Path, tuple[str, ...]] = {}
        self.steps = steps_of((), [])
        self.times: dict[str, TimeReading] = {}

    @property
    def written(self) -> float:
        """When steps were written last, in seconds since 1970."""
        return self._steps.modified

    def read(self) -> None:
        """Take in what has been appended."""
        new = self._steps.poll()
        if new is not None:
            if new.afresh:
                self._lines.clear()
            self._lines.extend(self._rows(self._steps.path, new))
            self.steps = steps_of(self._columns[self._steps.path], tuple(self._lines))
        new = self._times.poll()
        if new is not None:
            rows = self._rows(self._times.path, new)
            readings = times_of(self._columns[self._times.path], rows)
            known = {} if new.afresh else self.times
            self.times = {**known, **{reading.name: reading for reading in readings}}

    def _rows(self, path: Path, new: Appended) -> list[bytes]:
        """Lines of a table without that of its columns, which are read where it begins afresh."""
        if new.afresh:
            self._columns[path] = read_columns(path)
        header = csv_line(self._columns[path])
        return [line for line in new.lines if line != header]
