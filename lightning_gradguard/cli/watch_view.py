"""A run as it is at the moment, drawn to fill a terminal; imports rich."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

from lightning_gradguard.cli.progress import Seen
from lightning_gradguard.cli.watch_sections import (
    actions_taken,
    course,
    findings_open,
    rule,
    ways_through_time,
)
from lightning_gradguard.cli.words import duration
from lightning_gradguard.record.run_history import RunHistory

_STATUS = {
    "running": ("●", "green"),
    "finished": ("✓", "green"),
    "stopped": ("■", "yellow"),
    "failed": ("✗", "bold red"),
}
# A run that writes every second and is silent for so long may be no more.
_SILENT_SECONDS = 60.0
# Where several optimizers leave no room for all, findings and actions have at least so much.
_OTHER_LINES = 10
_PART_LINES = 6
# A section that gets fewer lines tells nothing.
_READABLE = 3
_TALLEST = 10
# Where there is no terminal to fill: the charts are as tall as in one of so many lines.
_PAGE = 30
_ENDLESS = 10**6


def view(seen: Seen, *, width: int, height: int | None = None) -> Text:
    """Draw a run.

    Args:
        seen: As it was found.
        width: Columns of the terminal.
        height: Lines of the terminal; default: as many as it takes.
    """
    lines = _header(seen, width)
    lines += _courses(seen, width, height or _PAGE)
    lines += _sections(seen.run, width, (height or _ENDLESS) - len(lines))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n").join(lines[:height])


def _courses(seen: Seen, width: int, height: int) -> list[Text]:
    fitting = max(1, (height - _OTHER_LINES) // _PART_LINES)
    optimizers = seen.run.optimizers
    shown, left_out = optimizers[:fitting], len(optimizers[fitting:])
    tall = min(max((height - 14) // (4 * max(len(shown), 1)), 2), _TALLEST)
    lines = [
        line for part in shown for line in course(part, width, tall, protecting=seen.protecting)
    ]
    more = f" and {left_out} more optimizer{'s' if left_out > 1 else ''}"
    return [*lines, Text(more, "dim")] if left_out else lines


def _sections(run: RunHistory, width: int, room: int) -> list[Text]:
    all_three = (findings_open(run, width), actions_taken(run), ways_through_time(run))
    sections = [section for section in all_three if section.lines]
    lines: list[Text] = []
    given = shares([len(section.lines) for section in sections], room)
    for section, rows in zip(sections, given, strict=False):
        shown = section.lines
        if len(shown) > rows:
            shown = [*shown[: rows - 1], Text(f" … {len(shown) - rows + 1} more lines", "dim")]
        lines += [rule(section.title, width), *shown]
    return lines


def shares(wanted: Sequence[int], room: int) -> list[int]:
    """How many lines each section gets below its title.

    The short ones are whole, and the last ones are left out where the rest would not be readable.

    Args:
        wanted: Lines of each section, without its title.
        room: Lines for all, with their titles.

    Example:
        >>> shares([1, 30, 4], 20), shares([1, 2], 80), shares([5, 5, 5], 10)
        ([1, 12, 4], [1, 2], [4, 4])
    """
    least = [1 + min(want, _READABLE) for want in wanted]
    kept = max((n for n in range(len(wanted) + 1) if sum(least[:n]) <= room), default=0)
    given = [0] * kept
    left = room - kept
    while left > 0 and given != list(wanted[:kept]):
        for place, want in enumerate(wanted[:kept]):
            if left > 0 and given[place] < want:
                given[place] += 1
                left -= 1
    return given


def _header(seen: Seen, width: int) -> list[Text]:
    run, info = seen.run, seen.run.info
    sign, style = _STATUS.get(info.status, ("?", "yellow"))
    name = info.name or str(run.directory or "")
    model = info.model + (f", {info.parameters:,} parameters" if info.parameters else "")
    silent = not seen.ended and seen.age > _SILENT_SECONDS
    what = "ended" if seen.ended else "updated"
    heard = "" if math.isnan(seen.age) else f"{what} {duration(seen.age)} ago "
    lines = [
        _ends(Text(f" {name}", "bold"), Text(f"{sign} {info.status} ", style), width),
        _ends(Text(f" {model}"), Text(heard, "bold yellow" if silent else "dim"), width),
        _progress(seen, width),
    ]
    if info.error:
        lines.append(Text(f" {info.error}", "red"))
    return lines


def _progress(seen: Seen, width: int) -> Text:
    planned = seen.run.info.planned_steps
    left = Text(f" step {seen.steps:,}" + (f" of {planned:,} " if planned else ""))
    right = Text(f"{seen.speed_words} ", "dim")
    if not planned:
        return _ends(left, right, width)
    share = min(seen.steps / planned, 1.0)
    columns = max(width - left.cell_len - right.cell_len - 7, 0)
    full = round(columns * share)
    bar = Text.assemble(("━" * full, "green"), ("━" * (columns - full), "dim"))
    return Text.assemble(left, bar, f" {share:4.0%}  ", right)


def _ends(left: Text, right: Text, width: int) -> Text:
    """One line: the one on the left, cut where it needs to be, the other on the right."""
    left = left.copy()
    left.truncate(max(width - right.cell_len - 1, 0), overflow="ellipsis", pad=True)
    return Text.assemble(left, " ", right)
