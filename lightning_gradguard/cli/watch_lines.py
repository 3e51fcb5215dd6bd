"""A run as it goes on, as lines of plain text."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_gradguard.cli.progress import Seen
from lightning_gradguard.cli.step_rows import last_rows
from lightning_gradguard.cli.words import number
from lightning_gradguard.diagnose import Finding
from lightning_gradguard.record.finding_groups import name_of
from lightning_gradguard.record.guard_state import guard_state
from lightning_gradguard.record.run_history import OptimizerHistory
from lightning_gradguard.respond.actions import Action


class NewLines:
    """What to print of a run that is looked at again and again: what is new, once."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def of(self, seen: Seen) -> Iterator[str]:
        """The lines that were not told before."""
        for about, line in _lines(seen):
            if self._told.get(about) != line:
                self._told[about] = line
                yield line


def _lines(seen: Seen) -> Iterator[tuple[str, str]]:
    """What each line is about, of which only changes are told, and the line."""
    info = seen.run.info
    for part in seen.run.optimizers:
        label = f"[{part.label}] " if part.label else ""
        if len(part.steps["step"]):
            yield f"{label}steps", label + _step_line(part, seen)
        for event in (*map(_finding_line, part.findings), *map(_action_line, part.actions)):
            yield label + event, label + event
    if seen.ended:
        error = f": {info.error}" if info.error else ""
        yield "end", f"{info.status} after {seen.steps} steps{error}"


def _finding_line(finding: Finding) -> str:
    head = f"{finding.severity.label}: {name_of(finding)}"
    if finding.until is not None:
        return f"{head} healed at step {finding.until}"
    return f"{head} at step {finding.step}: {finding.message}"


def _action_line(action: Action) -> str:
    return f"{action.kind.value} at step {action.step}: {action.message}"


def _step_line(part: OptimizerHistory, seen: Seen) -> str:
    steps = {name: column[-1] for name, column in part.steps.items()}
    planned = f" of {seen.run.info.planned_steps}" if seen.run.info.planned_steps else ""
    state = guard_state(last_rows(part.steps), protecting=seen.protecting)
    return (
        f"step {steps['step'] + 1:.0f}{planned}, loss {number(steps['loss'])}, "
        f"grad_norm {number(steps['total_norm'])}, guard {state}"
    )
