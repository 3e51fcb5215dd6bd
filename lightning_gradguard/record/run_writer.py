"""Keeps the history of a run on disk: bounded, readable at any moment, by anybody.

See ``docs/history.md`` for the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lightning_gradguard._validation import check_number
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.earlier_runs import put_aside, this_process
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.run_files import (
    HISTORY,
    INFO,
    LAYERS,
    STEPS,
    TIMESTEPS,
    UPDATES,
    folder_of,
    write_info,
)
from lightning_gradguard.record.run_history import STEP_COLUMNS, RunInfo
from lightning_gradguard.record.table_file import TableFile
from lightning_gradguard.record.table_rows import (
    TIME_COLUMNS,
    matrix_facts,
    matrix_lines,
    step_facts,
    step_lines,
    time_facts,
    time_line,
)


@dataclass(frozen=True)
class HistoryLimits:
    """How large the tables of a run may become, in bytes, those of all optimizers together.

    The defaults, the 4 MB of events and the copy that thinning makes of one table stay under 50 MB.

    Args:
        steps: Of ``steps.csv``. Default: some 200,000 steps of 50 bytes, of which at least the last
            100,000 are all there.
        layers: Of ``layers.csv``. Default: some 1,100 rows of 1,000 layers.
        updates: Of ``updates.csv``.
        timesteps: Of ``timesteps.csv``. Default: some 3,000 readings of long sequences.

    Raises:
        TypeError: If one is not an integer.
        ValueError: If one is below 1,000.

    Example:
        >>> HistoryLimits(layers=500)
        Traceback (most recent call last):
        ...
        ValueError: layers must be an integer >= 1000, got 500
    """

    steps: int = 10_000_000
    layers: int = 10_000_000
    updates: int = 8_000_000
    timesteps: int = 8_000_000

    def __post_init__(self) -> None:
        for limit in fields(self):
            check_number(limit.name, getattr(self, limit.name), at_least=1000, integer=True)


_LIMITS = HistoryLimits()


class RunWriter:
    """Writes the history of a run, in ``history`` in the run's ``gradguard`` directory.

    What it is given waits in memory for :meth:`flush`, which hands whole rows to the operating
    system: a process that is killed at any moment loses what was not flushed, and nothing else. A
    table that would outgrow its limit is thinned: the newest rows of half the limit stay as they
    are, the older ones keep one resolution over the whole past, with its highest norms and the
    dropped steps.

    A run that goes on from a checkpoint continues the history, and steps that it does again
    replace what was there of them. Another one puts what an earlier run has left, its events among
    it, into ``history-1``, ``history-2`` and so on, of which the last three are kept.

    Any :class:`OSError`, as of a full disk, is raised by :meth:`flush`, :meth:`update` or
    :meth:`close`, with the rows that waited let go. The writer can then be closed, or used on: the
    next flush tries again.

    Args:
        directory: The run's ``gradguard`` directory. Nothing is made in it before the first flush.
        info: What the run is. Limits are shared by as many optimizers as it names.
        resumed: Whether the run goes on from a checkpoint.
        limits: How large the tables may become.

    Attributes:
        info: What the run is, as of the last :meth:`update`.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> writer = RunWriter(directory, RunInfo("version_0"))
        >>> writer.steps("", [StepRecord(0, 2.5, 0.5, 1.0, 1.0, 0.1, 0, False, 1.0)])
        >>> writer.layers("", 0, {"encoder": 0.3, "head": 0.4})
        >>> writer.close()
        >>> print((directory / "history" / "layers.csv").read_text(), end="")
        step,encoder,head
        0,0.3,0.4
    """

    def __init__(
        self,
        directory: Path,
        info: RunInfo,
        *,
        resumed: bool = False,
        limits: HistoryLimits = _LIMITS,
    ) -> None:
        self.info = info
        self._folder = directory / HISTORY
        self._limits = limits
        self._parts: dict[str, _Part] = {}
        self._begun = False
        self._in_the_way: OSError | None = None
        try:
            put_aside(directory, resumed=resumed)
        except OSError as error:
            self._in_the_way = error  # to be told where the caller expects it

    def steps(self, label: str, rows: Sequence[StepRecord]) -> None:
        """Take in optimizer steps, oldest first.

        Args:
            label: Of the optimizer; empty if there is only one.
            rows: The steps.
        """
        self._part(label).waiting_steps.extend(rows)

    def layers(self, label: str, step: int, norms: Mapping[str, float]) -> None:
        """Take in the gradient norm of each layer; one that is new gets a column.

        Args:
            label: Of the optimizer.
            step: Optimizer step.
            norms: By layer; one without a gradient may be missing.
        """
        self._part(label).waiting_layers.append((step, dict(norms)))

    def updates(self, label: str, step: int, ratios: Mapping[str, float]) -> None:
        """Take in the relative update of each layer.

        Args:
            label: Of the optimizer.
            step: Optimizer step.
            ratios: By layer.
        """
        self._part(label).waiting_updates.append((step, dict(ratios)))

    def times(self, label: str, readings: Sequence[TimeReading]) -> None:
        """Take in readings through time, oldest first.

        Args:
            label: Of the optimizer.
            readings: The readings.
        """
        self._part(label).waiting_times.extend(readings)

    def flush(self) -> None:
        """Hand what waits to the operating system.

        Raises:
            OSError: If a table cannot be written, or an earlier run not be put aside.
        """
        try:
            if not any(part.is_waiting for part in self._parts.values()):
                return
            if not self._begun:
                self.update(self.info)
            for part in self._parts.values():
                part.flush()
        finally:
            for part in self._parts.values():
                part.let_go()

    def update(self, info: RunInfo) -> None:
        """Write down what the run is now.

        Args:
            info: Takes the place of the one before.

        Raises:
            OSError: If it cannot be written.
        """
        self.info = replace(info, process=this_process())
        if self._in_the_way is not None:
            raise self._in_the_way
        self._folder.mkdir(parents=True, exist_ok=True)
        write_info(self._folder / INFO, self.info)
        self._begun = True

    def close(self) -> None:
        """Flush and close the files. Again, it does nothing.

        Raises:
            OSError: If the last rows cannot be written; the files are closed all the same.
        """
        try:
            self.flush()
        finally:
            for part in self._parts.values():
                part.close()

    def _part(self, label: str) -> _Part:
        if label not in self._parts:
            folder = self._folder / folder_of(label)
            self._parts[label] = _Part(folder, self._limits, max(1, len(self.info.optimizers)))
        return self._parts[label]


class _Part:
    """The tables of one optimizer, and what waits to be written into them.

    Args:
        folder: Where they lie.
        limits: Of all optimizers together.
        share: How many they are.
    """

    def __init__(self, folder: Path, limits: HistoryLimits, share: int) -> None:
        self._steps = TableFile(folder / STEPS, step_facts, limits.steps // share, STEP_COLUMNS)
        self._layers = TableFile(folder / LAYERS, matrix_facts, limits.layers // share)
        self._updates = TableFile(folder / UPDATES, matrix_facts, limits.updates // share)
        self._times = TableFile(
            folder / TIMESTEPS,
            time_facts,
            limits.timesteps // share,
            TIME_COLUMNS,
            shared_steps=True,
        )
        self.let_go()

    def let_go(self) -> None:
        """Forget what waits."""
        self.waiting_steps: list[StepRecord] = []
        self.waiting_layers: list[tuple[int, Mapping[str, float]]] = []
        self.waiting_updates: list[tuple[int, Mapping[str, float]]] = []
        self.waiting_times: list[TimeReading] = []

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to write."""
        return bool(
            self.waiting_steps or self.waiting_layers or self.waiting_updates or self.waiting_times
        )

    def flush(self) -> None:
        """Write what waits."""
        self._steps.append(step_lines(self.waiting_steps))
        _append_rows(self._layers, self.waiting_layers)
        _append_rows(self._updates, self.waiting_updates)
        self._times.append([time_line(reading) for reading in self.waiting_times])

    def close(self) -> None:
        """Close the files."""
        for table in (self._steps, self._layers, self._updates, self._times):
            table.close()


def _append_rows(table: TableFile, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    if rows:
        for _, values in rows:
            table.widen(values)
        table.append(matrix_lines(table.columns, rows))
