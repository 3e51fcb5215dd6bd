"""An append-only log of what was found and done, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from lightning_gradguard.record.plain_values import plain_values

SCHEMA_VERSION = 1


class EventLog:
    """Appends events to a file, each complete on disk before the next step begins.

    A line is handed to the operating system at once, so that a killed process loses nothing; a
    line that was cut short by a crash is left behind by the next writer and ignored by
    :func:`read_events`. The file and its folders are made with the first event: a run in which
    nothing happens leaves nothing behind.

    Args:
        path: File to append to.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run" / "events.jsonl"
        >>> log = EventLog(path)
        >>> log.write("action", {"kind": "skip", "step": 3})
        >>> log.close()
        >>> next(read_events(path))["step"]
        3
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one event with its type and values."""
        if self._file is None:
            self._file = self._open()
        row = {"event": event, "schema": SCHEMA_VERSION, **values}
        line = json.dumps(plain_values(row), allow_nan=False) + "\n"
        self._file.write(line.encode())

    def close(self) -> None:
        """Close the file; a later :meth:`write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a full disk refused is not tried again when the file is closed.
        file = self.path.open("ab", buffering=0)
        if file.tell() > 0 and not self.path.read_bytes().endswith(b"\n"):
            file.write(b"\n")  # the last writer died inside a line: do not continue it
        return file


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, in order; lines that a crash cut short are left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            yield event
