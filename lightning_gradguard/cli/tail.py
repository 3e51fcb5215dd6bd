"""What is appended to a file, without reading again what was there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Appended:
    """Lines that were not seen before.

    Attributes:
        lines: With their ends, in order.
        afresh: Whether they are of a file that has taken the place of the one before, or is the
            first: what was read until now counts no more.
    """

    lines: list[bytes]
    afresh: bool


class Tail:
    r"""Reads a file of lines that another process appends to.

    Only a file that has grown is opened, and read from where it was left. One that was replaced, or
    is shorter than it was, is begun again at its last ``max_bytes``. A line is read once its end is
    written.

    Args:
        path: The file, which need not be there yet.
        max_bytes: How much of a file is read at first.

    Attributes:
        modified: When the file was written to last, in seconds since 1970; 0 if there is none.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log"
        >>> tail = Tail(path)
        >>> path.write_text("a\nb\nc")
        5
        >>> tail.poll().lines, tail.poll()
        ([b'a\n', b'b\n'], None)
    """

    def __init__(self, path: Path, max_bytes: int = 10_000_000) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.modified = 0.0
        self._file: tuple[int, int] | None = None
        self._state: tuple[int, ...] = ()
        self._done = 0

    def poll(self) -> Appended | None:
        """What has been appended since the last call; ``None`` if nothing was.

        Raises:
            OSError: If the file is there and cannot be read.
        """
        try:
            if self._file is not None and state_of(self.path.stat()) == self._state:
                return None
            with self.path.open("rb") as file:
                return self._read(file)
        except FileNotFoundError:
            was_there, self._file = self._file is not None, None
            return Appended([], afresh=True) if was_there else None

    def _read(self, file: BinaryIO) -> Appended | None:
        known = os.fstat(file.fileno())  # not of the path, where another may be by now
        identity = known.st_dev, known.st_ino
        afresh = identity != self._file or known.st_size < self._done
        begin = max(known.st_size - self.max_bytes, 0) if afresh else self._done
        file.seek(begin)
        data = file.read()
        end = data.rfind(b"\n") + 1
        self._file, self._state, self._done = identity, state_of(known), begin + end
        self.modified = known.st_mtime
        lines = data[:end].splitlines(keepends=True)
        if afresh and begin:
            del lines[:1]  # it may have begun before
        return Appended(lines, afresh) if lines or afresh else None


def state_of(known: os.stat_result) -> tuple[int, ...]:
    """What differs once a file has been written to or replaced."""
    return known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns
