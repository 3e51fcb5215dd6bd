"""One table of a run's history: a CSV file that grows at its end, within a bound."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from lightning_gradguard.record.thinning import Facts, not_done_again, thinned
from lightning_gradguard.record.whole_files import append_whole, replace_whole

STEP = "step"

# A line is a row and a row is a line, so that one that was cut short is known by its missing end.
_NOT_WRITTEN = re.compile(r"[\\\x00-\x1f\x7f\ud800-\udfff]")
_INSTEAD = re.compile(r"\\u([0-9a-f]{4})")


def csv_line(cells: Iterable[str]) -> bytes:
    r"""A line of a CSV file; characters that would break it are written as in JSON.

    Example:
        >>> csv_line(["encoder", 'a "b", c', "two\nlines"])
        b'encoder,"a ""b"", c",two\\u000alines\n'
        >>> csv_cells(_)
        ['encoder', 'a "b", c', 'two\nlines']
    """
    cells, text = list(cells), io.StringIO()
    if _NOT_WRITTEN.search("".join(cells)):
        cells = [_NOT_WRITTEN.sub(lambda found: f"\\u{ord(found[0]):04x}", cell) for cell in cells]
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def csv_cells(line: bytes) -> list[str]:
    """The inverse of :func:`csv_line`.

    Raises:
        ValueError: If it is not a line of text.
    """
    try:
        cells = next(csv.reader([line.decode()]))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if b"\\u" not in line:
        return cells
    return [_INSTEAD.sub(lambda found: chr(int(found[1], 16)), cell) for cell in cells]


def step_of(line: bytes) -> int:
    """The step of a row, which is its first cell.

    Raises:
        ValueError: If there is none.
    """
    return int(line.split(b",", 1)[0])


def read_table(path: Path) -> tuple[tuple[str, ...], list[bytes]]:
    """Columns and rows of a table, without a last line that was cut short.

    Returns:
        The names of the columns, and the lines; none if there is no such table, or nothing in it.
    """
    return _parts(path.read_bytes()) if path.is_file() else ((), [])


def read_columns(path: Path) -> tuple[str, ...]:
    """The names of the columns alone; none if there is no such table, or nothing in it."""
    if not path.is_file():
        return ()
    with path.open("rb") as file:
        return _parts(file.readline())[0]


def _parts(data: bytes) -> tuple[tuple[str, ...], list[bytes]]:
    header, *lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
    try:
        columns = tuple(csv_cells(header)) if header else ()
    except ValueError:
        columns = ()
    return (columns, lines) if columns[:1] == (STEP,) else ((), [])


class TableFile:
    r"""Rows in the order of their steps, in a file that is whole at any moment.

    A row of a step that is done again takes the place of the earlier rows from that step on. Where
    the file would outgrow its bound, the newest rows, of half the bound, stay as they are, and of
    the older ones as many as fill a quarter of it (:func:`thinned`); the rest of the bound is room
    to grow.

    Args:
        path: The file. It is made with the first row.
        facts: Tells what thinning goes by, for lines of this table; raises ``ValueError`` for
            others.
        max_bytes: The bound. A single row may be larger.
        columns: If they are known beforehand; else :meth:`widen` names them.
        shared_steps: Whether several rows may be of one step.

    Example:
        >>> import tempfile
        >>> def facts(lines):
        ...     return Facts.of_steps(np.array([step_of(line) for line in lines]))
        >>> table = TableFile(Path(tempfile.mkdtemp()) / "t.csv", facts, 1000, ("step", "norm"))
        >>> table.append([b"0,1.5\n", b"1,1.25\n"])
        >>> table.append([b"1,1.75\n"])
        >>> table.close()
        >>> table.path.read_bytes()
        b'step,norm\n0,1.5\n1,1.75\n'
    """

    def __init__(
        self,
        path: Path,
        facts: Callable[[Sequence[bytes]], Facts],
        max_bytes: int,
        columns: Sequence[str] | None = None,
        *,
        shared_steps: bool = False,
    ) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._take((STEP,) if columns is None else tuple(columns))
        self._grows = columns is None
        self._facts = facts
        self._shared_steps = shared_steps
        self._file: FileIO | None = None
        self._size = 0
        self._last = -1

    def widen(self, names: Collection[str]) -> None:
        """Add a column for each name that has none; earlier rows have NaN there.

        Raises:
            OSError: If the file cannot be read or written.
        """
        self._open()
        if self._names.issuperset(names):
            return
        new = tuple(name for name in dict.fromkeys(names) if name not in self._names)
        columns = self.columns + new
        if self._size:
            end = b",nan" * len(new) + b"\n"
            self._rewrite(columns, [line[:-1] + end for line in read_table(self.path)[1]])
        self._take(columns)

    def append(self, lines: Sequence[bytes]) -> None:
        """Append rows, each a line with its end.

        Raises:
            OSError: If they cannot be written; none of them is then.
        """
        if not lines:
            return
        file = self._open()
        steps = np.array([step_of(line) for line in lines], np.int64)
        stays = not_done_again(steps, shared=self._shared_steps)
        lines = [line for line, stay in zip(lines, stays, strict=True) if stay]
        first = step_of(lines[0])
        data = b"".join([b"" if self._size else csv_line(self.columns), *lines])
        if first < self._last or (first == self._last and not self._shared_steps):
            before = [line for line in read_table(self.path)[1] if step_of(line) < first]
            self._rewrite(self.columns, before + lines)
        elif self._size + len(data) > self.max_bytes:
            self._rewrite(self.columns, read_table(self.path)[1] + lines)
        else:
            self._append(file, data)
        self._last = step_of(lines[-1])

    def close(self) -> None:
        """Close the file; a later :meth:`append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _take(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self._names = frozenset(columns[1:])

    def _append(self, file: FileIO, data: bytes) -> None:
        try:
            append_whole(file, data)
        except OSError:
            self.close()  # what it is like now is looked at before the next row
            raise
        self._size += len(data)

    def _open(self) -> FileIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self._mend()
            self._file = self.path.open("ab", buffering=0)
            self._size = self._file.tell()
        return self._file

    def _mend(self) -> None:
        """Take up what is there, without what a crash has damaged."""
        data = self.path.read_bytes()
        columns, lines = _parts(data)
        if columns and (self._grows or columns == self.columns):
            self._take(columns)
            lines = self._readable(lines)
            whole = b"".join([csv_line(columns), *lines])
        else:
            lines, whole = [], b""
        self._last = step_of(lines[-1]) if lines else -1
        if whole != data:
            replace_whole(self.path, whole)

    def _readable(self, lines: list[bytes]) -> list[bytes]:
        try:
            self._facts(lines)
        except ValueError:  # a machine that lost its power leaves zeros where lines should be
            return [line for line in lines if self._is_readable(line)]
        return lines

    def _is_readable(self, line: bytes) -> bool:
        try:
            self._facts([line])
        except ValueError:
            return False
        return True

    def _rewrite(self, columns: tuple[str, ...], lines: list[bytes]) -> None:
        header = csv_line(columns)
        data = header + b"".join(self._within(lines, self.max_bytes - len(header)))
        self.close()  # on Windows an open file cannot be replaced
        replace_whole(self.path, data)
        self._file = self.path.open("ab", buffering=0)
        self._size = len(data)

    def _within(self, lines: list[bytes], max_bytes: int) -> list[bytes]:
        sizes = np.array([len(line) for line in lines], np.int64)
        if sizes.sum() <= max_bytes:
            return lines
        newer = np.cumsum(sizes[::-1]) <= max_bytes / 2
        older = len(lines) - max(1, int(newer.sum()))
        if older == 0:
            return lines
        stays = thinned(self._facts(lines[:older]), sizes[:older], max_bytes // 4)
        return [line for line, stay in zip(lines, stays, strict=False) if stay] + lines[older:]
