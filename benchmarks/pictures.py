"""Pictures of results, where they can be drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def if_matplotlib_is_there() -> Iterator[None]:
    """Draw inside of it; without matplotlib, say so and go on."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("no plot: matplotlib is not installed")
