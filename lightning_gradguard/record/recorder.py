"""Where findings and actions go: memory, the event log, the console."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lightning_gradguard.diagnose import Finding, Severity
from lightning_gradguard.record.history import History, StepRecord
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
_CONSOLE_ONCE = {ActionKind.SKIP, ActionKind.TIGHTEN, ActionKind.BACK_OFF, ActionKind.RECOVER}
_MAX_KEPT = 1000


class Recorder:
    """Keeps what happened and tells people.

    Findings reach the console once each, when they open; actions of one kind once, the later ones
    only the event log and the report. The console is Python's logger ``lightning_gradguard``.

    Args:
        label: Name of the optimizer, put before console lines; empty if there is only one.
        max_rows: Bound on the history in memory.
        silent: Say and write nothing (for all ranks but one).
    """

    def __init__(self, label: str = "", max_rows: int = 10_000, *, silent: bool = False) -> None:
        self.label = label
        self.silent = silent
        self.events: EventLog | None = None
        self.findings: list[Finding] = []
        self.actions: list[Action] = []
        self.last: StepRecord | None = None
        self._history = History(max_rows)
        self._told: set[ActionKind] = set()

    @property
    def history(self) -> list[StepRecord]:
        """The last steps, oldest first."""
        return self._history.rows

    def step(self, row: StepRecord) -> None:
        """Record one optimizer step."""
        self.last = row
        self._history.append(row)

    def finding(self, finding: Finding) -> None:
        """Record a finding that opened."""
        _keep(self.findings, finding)
        self._write("finding", finding.to_dict())
        self._say(_LEVELS[finding.severity], finding.message)

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

    def _say(self, level: int, message: str) -> None:
        if not self.silent:
            prefix = f"[{self.label}] " if self.label else ""
            logger.log(level, "%s%s", prefix, message)


def _keep(items: list, item: object) -> None:  # type: ignore[type-arg]
    """Append, within a bound: the first half is kept for good, the rest is the latest."""
    items.append(item)
    if len(items) > _MAX_KEPT:
        del items[_MAX_KEPT // 2]
