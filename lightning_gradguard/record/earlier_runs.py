"""What an earlier run has left where a new one begins."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

from lightning_gradguard.record.run_files import EVENTS, HISTORY, INFO, REPORT, SCHEMA

# Histories of earlier runs that stay.
_KEPT = 3

_PUT_ASIDE = re.compile(rf"{HISTORY}-(\d+)")


def put_aside(directory: Path, *, resumed: bool) -> None:
    """Put what an earlier run has left aside, unless this one continues it.

    History, events and report go to ``history-1``, or the number after the highest there is. The
    last three stay.

    Args:
        directory: The run's ``gradguard`` directory.
        resumed: Whether the run goes on from a checkpoint. It continues what it can read.

    Raises:
        OSError: If they cannot be moved, or belong to a run that is under way in another process of
            this machine.

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
    before = _info_of(history)
    if before.get("status") == "running" and is_another(str(before.get("process", ""))):
        raise OSError(errno.EBUSY, "a run that is under way in another process keeps its own there")
    if resumed and before.get("schema", SCHEMA) == SCHEMA:
        return
    # Without either, the run before has ended before its first step: nobody misses it.
    if not events.is_file() and not any(history.glob("**/*.csv")):
        return
    history.mkdir(exist_ok=True)
    for file in (events, directory / REPORT):
        if file.is_file():
            file.replace(history / file.name)  # first: a history that has its name is complete
    numbers = sorted(_numbers(directory))
    history.replace(directory / f"{HISTORY}-{numbers[-1] + 1 if numbers else 1}")
    for number in numbers[: -_KEPT + 1]:
        # One that cannot be removed now is tried again by the next run.
        shutil.rmtree(directory / f"{HISTORY}-{number}", ignore_errors=True)


def _numbers(directory: Path) -> list[int]:
    found = (_PUT_ASIDE.fullmatch(path.name) for path in directory.iterdir())
    return [int(name[1]) for name in found if name]


def this_process() -> str:
    """This process among those of all machines, as long as it lives."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_another(process: str) -> bool:
    """Whether it is another process than this one, on this machine, that is alive.

    Of other machines it is not known, and on Windows not asked: there the question ends a process.
    """
    host, _, number = process.rpartition(":")
    if process == this_process() or host != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(int(number), 0)
    except PermissionError:  # of another user
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _info_of(history: Path) -> dict[str, Any]:
    """Its ``run.json``; empty if there is none that can be read."""
    try:
        values = json.loads((history / INFO).read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
