"""Files that whoever reads them finds whole, whenever their writer was killed.

Nothing is forced onto the disk: a process that dies loses nothing, a machine that loses its power
may lose the last seconds.
"""

from __future__ import annotations

import contextlib
from io import FileIO
from pathlib import Path


def append_whole(file: FileIO, data: bytes) -> None:
    """Append all of ``data`` or, on a disk that is full, nothing.

    Args:
        file: Open for appending, without a buffer: what a full disk has refused must not be tried
            again when the file is closed.
        data: In one write, so that a killed process leaves no part of it behind.

    Raises:
        OSError: If it cannot be written.
    """
    end = file.tell()
    left = memoryview(data)
    try:
        while left:  # the last bytes of a disk that is nearly full are a part only
            left = left[file.write(left) :]
    except OSError:
        with contextlib.suppress(OSError):  # a part that stays is a line that readers leave out
            file.truncate(end)
        raise


def replace_whole(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of a file, in one step for whoever reads it.

    Raises:
        OSError: If it cannot be written; the file is as it was then.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.json"
        >>> replace_whole(path, b"{}")
        >>> [file.name for file in path.parent.iterdir()]
        ['run.json']
    """
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the next one takes its place
            new.unlink()
        raise
