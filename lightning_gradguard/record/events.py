"""An append-only log of what was found and done, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from lightning_gradguard._validation import check_number
from lightning_gradguard.record.plain_values import plain_values
from lightning_gradguard.record.whole_files import append_whole, replace_whole

SCHEMA_VERSION = 1

# Stands where events were left out.
_GAP = json.dumps({"event": "left_out", "schema": SCHEMA_VERSION}).encode() + b"\n"


class EventLog:
    """Appends events to a file, each complete on disk before the next step begins.

    A line is handed to the operating system at once, so that a killed process loses nothing; a
    line that was cut short by a crash is left behind by the next writer and ignored by
    :func:`read_events`. The file and its folders are made with the first event: a run in which
    nothing happens leaves nothing behind. A file that would outgrow its bound is cut to half of it
    by leaving out its middle: how it began stays, and the latest.

    Args:
        path: File to append to.
        max_bytes: The bound; a single event may be larger. Default: some 15,000 actions, or 2,000
            findings.

    Raises:
        TypeError: If ``max_bytes`` is not an integer.
        ValueError: If ``max_bytes`` is below 1,000.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run" / "events.jsonl"
        >>> log = EventLog(path)
        >>> log.write("action", {"kind": "skip", "step": 3})
        >>> log.close()
        >>> next(read_events(path))["step"]
        3
    """

    def __init__(self, path: Path, max_bytes: int = 4_000_000) -> None:
        check_number("max_bytes", max_bytes, at_least=1000, integer=True)
        self.path = path
        self.max_bytes = max_bytes
        self._file: FileIO | None = None

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one event with its type and values.

        Raises:
            OSError: If it cannot be written.
        """
        row = {"event": event, "schema": SCHEMA_VERSION, **values}
        line = (json.dumps(plain_values(row), allow_nan=False) + "\n").encode()
        if self._file is None:
            self._file = self._open()
        if self._file.tell() + len(line) > self.max_bytes:
            self.close()  # on Windows an open file cannot be replaced
            self._leave_out_the_middle()
            self._file = self._open()
        append_whole(self._file, line)

    def close(self) -> None:
        """Close the file; a later :meth:`write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _leave_out_the_middle(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        gap = lines.index(_GAP) if _GAP in lines else len(_within(lines, self.max_bytes // 4))
        first, later = lines[:gap], [line for line in lines[gap:] if line != _GAP]
        last = _within(later[::-1], self.max_bytes // 4)
        replace_whole(self.path, b"".join([*first, _GAP, *last[::-1]]))

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a full disk refused is not tried again when the file is closed.
        file = self.path.open("ab", buffering=0)
        if file.tell() > 0 and not self.path.read_bytes().endswith(b"\n"):
            file.write(b"\n")  # the last writer died inside a line: do not continue it
        return file


def _within(lines: Sequence[bytes], max_bytes: int) -> list[bytes]:
    """The first lines that take at most so many bytes."""
    ends = accumulate(len(line) for line in lines)
    return [line for line, end in zip(lines, ends, strict=True) if end <= max_bytes]


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, in order; lines that a crash cut short are left out."""
    yield from events_in(path.read_bytes().splitlines())


def events_in(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The events in lines of such a file."""
    for line in lines:
        try:
            event = json.loads(line.decode(errors="replace"))
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            yield event
