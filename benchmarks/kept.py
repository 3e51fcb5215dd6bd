"""Where a benchmark keeps its runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_for(cache: Path | None) -> Iterator[Path]:
    """The folder that the user names, or one for as long as the benchmark runs."""
    if cache is not None:
        yield cache
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)
