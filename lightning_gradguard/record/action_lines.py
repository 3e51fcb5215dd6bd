"""What the guard did, as lines for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from lightning_gradguard.respond.actions import Action, ActionKind

_MAX_LINES = 20


def action_lines(actions: Sequence[Action]) -> list[str]:
    """What was done and when, one line each, a series of one kind as one line.

    Args:
        actions: In the order in which they were taken.
    """
    lines: list[str] = []
    for kind, series in groupby(actions, key=lambda action: action.kind):
        members = list(series)
        if len(members) == 1:
            lines.append(f"step {members[0].step}: {members[0].message}")
        else:
            lines.append(_series_line(kind, members))
    if len(lines) > _MAX_LINES:
        left_out = len(lines) - _MAX_LINES
        lines = [*lines[: _MAX_LINES // 2], f"... {left_out} more ...", *lines[-_MAX_LINES // 2 :]]
    return lines


def _series_line(kind: ActionKind, actions: Sequence[Action]) -> str:
    """What a series of actions of one kind amounted to; the last message tells why."""
    where = f"steps {actions[0].step}-{actions[-1].step}"
    if kind is ActionKind.SKIP:
        return f"{where}: {len(actions)} steps skipped"
    numbers = [next(iter(action.numbers.values()), math.nan) for action in actions]
    values = ", ".join(f"{number:.3g}" for number in numbers)
    name = next(iter(actions[-1].numbers), kind.value)
    return f"{where}: {len(actions)} times, {name} {values}. Last: {actions[-1].message}"
