"""Where findings and actions go: memory, the event log, the console."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning_gradguard.diagnose import Finding, Severity
from lightning_gradguard.readings import Inspection, TimeReading
from lightning_gradguard.record.history import History, StepRecord, later_than
from lightning_gradguard.respond.actions import Action, ActionKind

if TYPE_CHECKING:
    from lightning_gradguard.record.events import EventLog

logger = logging.getLogger("lightning_gradguard")

_LEVELS = {
    Severity.INFO: logging.INFO,
    Severity.WARNING: logging.WARNING,
    Severity.CRITICAL: logging.ERROR,
}
# A skip is worth a line the first time; a hundred lines for a hundred NaN batches help nobody.
_CONSOLE_ONCE = {
    ActionKind.SKIP,
    ActionKind.TIGHTEN,
    ActionKind.BACK_OFF,
    ActionKind.RECOVER,
    ActionKind.BOOST,
}
_MAX_KEPT = 1000
# Of 256 bins each, about 4 MB.
_MAX_READINGS = 1000


class Recorder:
    """Keeps what happened and tells people.

    Findings reach the console once each, when they open; actions of one kind once, the later ones
    only the event log and the report. The console is Python's logger ``lightning_gradguard``.

    Args:
        label: Name of the optimizer, put before console lines; empty if there is only one.
        max_rows: Bound on the history in memory.
        silent: Say and write nothing (for all ranks but one).

    Attributes:
        listeners: Each is called with every action, and with a finding when it opens, turns worse
            or outlasts what explained it; of a silent recorder none is.
    """

    def __init__(self, label: str = "", max_rows: int = 10_000, *, silent: bool = False) -> None:
        self.label = label
        self.silent = silent
        self.events: EventLog | None = None
        self.findings: list[Finding] = []
        self.actions: list[Action] = []
        self.last: StepRecord | None = None
        self.inspection: Inspection | None = None
        self._history = History(max_rows)
        self._readings: deque[TimeReading] = deque(maxlen=_MAX_READINGS)
        self._latest: dict[str, TimeReading] = {}
        self._told: set[ActionKind] = set()
        self.listeners: list[Callable[[Finding | Action], None]] = []

    @property
    def history(self) -> list[StepRecord]:
        """The last steps, oldest first."""
        return self._history.rows

    def history_since(self, step: int) -> list[StepRecord]:
        """Later steps than ``step``, oldest first, as far as they are still kept."""
        return self._history.since(step)

    @property
    def readings(self) -> list[TimeReading]:
        """The last readings through time, oldest first."""
        return list(self._readings)

    def readings_since(self, step: int) -> list[TimeReading]:
        """Readings through time of later steps than ``step``, oldest first."""
        return later_than(step, self._readings)

    @property
    def latest_readings(self) -> list[TimeReading]:
        """The newest reading of each module, layer and direction.

        A module that was measured exactly by layer and direction has no other reading here.
        """
        parts = {r.module for r in self._latest.values() if r.part}
        return [r for r in self._latest.values() if r.part or r.module not in parts]

    def step(self, row: StepRecord) -> None:
        """Record one optimizer step."""
        self.last = row
        self._history.append(row)

    def time(self, readings: Sequence[TimeReading]) -> None:
        """Record readings through time."""
        self._readings.extend(readings)
        self._latest.update({reading.name: reading for reading in readings})

    def inspect(self, inspection: Inspection) -> None:
        """Record a look at every layer; the newest is kept."""
        self.inspection = inspection

    def finding(self, finding: Finding) -> bool:
        """Record a finding that opened, changed or healed; returns whether it is a new one."""
        before = self._before(finding)
        known = None if before is None else self.findings[before]
        worse = known is None or finding.severity > known.severity
        outlasts = known is not None and bool(known.follows_from) and not finding.follows_from
        self._write("finding", finding.to_dict())
        if before is None:
            _keep(self.findings, finding)
        else:
            self.findings[before] = finding
        if finding.until is None and worse:
            level = logging.INFO if finding.follows_from else _LEVELS[finding.severity]
            self._say(level, finding.message)
        if finding.until is None and (worse or outlasts):
            self._notify(finding)
        return before is None

    def resume(self, step: int) -> None:
        """The run goes on from a checkpoint: what was recorded from its step on is taken back.

        Args:
            step: The step that comes next.
        """
        if self.events is not None and self.events.path.exists():
            self._write("resumed", {"step": step})

    def adopt(self, findings: Sequence[Finding]) -> None:
        """Take over findings that a resumed run had open, so that they heal as the same ones."""
        self.findings.extend(findings)
        for finding in findings:  # it may be resumed in another directory
            self._write("finding", finding.to_dict())

    def _before(self, finding: Finding) -> int | None:
        """Where the same finding stands as it was before."""
        for place in range(len(self.findings) - 1, -1, -1):
            known = self.findings[place]
            if known.until is None and known.cause == finding.cause:
                return place
        return None

    def action(self, action: Action) -> None:
        """Record something the guard did."""
        _keep(self.actions, action)
        self._write("action", action.to_dict())
        if action.kind not in self._told:
            more = ""
            if action.kind in _CONSOLE_ONCE:
                self._told.add(action.kind)
                more = " (told once; later ones are in the report)"
            self._say(logging.WARNING, action.message + more)
        self._notify(action)

    def _write(self, event: str, values: dict[str, object]) -> None:
        if self.events is None or self.silent:
            return
        try:
            self.events.write(event, {"optimizer": self.label, **values})
        except OSError as error:
            # A full disk is no reason to leave the run unguarded.
            path = self.events.path
            self.events.close()
            self.events = None
            logger.error(  # noqa: TRY400 - the reason says it all
                "%s cannot be written (%s); training goes on guarded, without it.", path, error
            )

    def _notify(self, event: Finding | Action) -> None:
        if not self.silent:
            for listener in tuple(self.listeners):
                listener(event)

    def _say(self, level: int, message: str) -> None:
        if not self.silent:
            prefix = f"[{self.label}] " if self.label else ""
            logger.log(level, "%s%s", prefix, message)


def _keep(items: list, item: object) -> None:  # type: ignore[type-arg]
    """Append, within a bound: the first half is kept for good, the rest is the latest."""
    items.append(item)
    if len(items) > _MAX_KEPT:
        del items[_MAX_KEPT // 2]
