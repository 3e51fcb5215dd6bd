"""Training without the advice that is meant for real runs."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

from typing_extensions import override

# Of Lightning: the hardware and tips; of the guard: its reports. Its internal errors stay.
LOGGERS = ("lightning.pytorch", "lightning_gradguard")


class NoTerminal(io.StringIO):
    """Writes to a stream, and is no terminal: to one the guard shows its report after each run."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    @override
    def write(self, text: str) -> int:
        return self.stream.write(text)

    @override
    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning and the guard say of each of many runs."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(NoTerminal(sys.stderr)):
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", ".*passed in a `val_dataloader`")
            # Lightning 2.6 checks tree specs in a way that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
