"""What an earlier run has left where a new one begins."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from lightning_gradguard.record.run_files import EVENTS, HISTORY, INFO, SCHEMA

# Histories of earlier runs that stay.
_KEPT = 3

_PUT_ASIDE = re.compile(rf"{HISTORY}-(\d+)")


def put_aside(directory: Path, *, resumed: bool) -> None:
    """Put the history and the events of an earlier run aside, unless this one continues it.

    They go to ``history-1``, or the number after the highest there is. The last three stay.

    Args:
        directory: The run's ``gradguard`` directory.
        resumed: Whether the run goes on from a checkpoint. It continues what it can read.

    Raises:
        OSError: If they cannot be moved.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> (directory / "events.jsonl").write_text("{}")
        2
        >>> put_aside(directory, resumed=False)
        >>> [str(path.relative_to(directory)) for path in directory.rglob("*.jsonl")]
        ['history-1/events.jsonl']
    """
    history, events = directory / HISTORY, directory / EVENTS
    if resumed and _schema_of(history) in (None, SCHEMA):
        return
    # Without either, the run before has ended before its first step: nobody misses it.
    if not events.is_file() and not any(history.glob("**/*.csv")):
        return
    history.mkdir(exist_ok=True)
    if events.is_file():
        events.replace(history / EVENTS)  # first: a history that has its name is complete
    numbers = sorted(_numbers(directory))
    history.replace(directory / f"{HISTORY}-{numbers[-1] + 1 if numbers else 1}")
    for number in numbers[: -_KEPT + 1]:
        # One that cannot be removed now is tried again by the next run.
        shutil.rmtree(directory / f"{HISTORY}-{number}", ignore_errors=True)


def _numbers(directory: Path) -> list[int]:
    found = (_PUT_ASIDE.fullmatch(path.name) for path in directory.iterdir())
    return [int(name[1]) for name in found if name]


def _schema_of(history: Path) -> object:
    """That of its ``run.json``; ``None`` if there is none that can be read."""
    try:
        values = json.loads((history / INFO).read_bytes())
    except (OSError, ValueError):
        return None
    return values.get("schema") if isinstance(values, dict) else None
