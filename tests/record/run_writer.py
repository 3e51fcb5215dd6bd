"""Writes histories, over and over, in processes that a test kills on the way."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning_gradguard.record.run_writer import HistoryLimits, RunWriter
from tests.record.run_files import ONE, layer_norms, step_row, time_reading

# So small that a table is thinned again and again.
LIMITS = HistoryLimits(steps=3000, layers=2000, updates=2000, timesteps=200_000)
ROWS_A_FLUSH = 3


def write(directory: Path, start: int) -> None:
    """Write from a step on, as a run that was resumed there, and tell the last that is flushed."""
    writer = RunWriter(directory, ONE, resumed=start > 0, limits=LIMITS)
    for first in range(start, start + 10**6, ROWS_A_FLUSH):
        for step in range(first, first + ROWS_A_FLUSH):
            writer.steps("", [step_row(step)])
            writer.layers("", step, layer_norms(step))
            writer.updates("", step, layer_norms(step, 2))
            writer.times("", [time_reading(step), time_reading(step, "l1")])
        writer.flush()
        os.write(1, b"%d\n" % (first + ROWS_A_FLUSH - 1))


def main(directory: Path) -> None:
    """For each step that it is told, write from there on; the one who tells ends it."""
    for start in sys.stdin:
        # From a process that has imported everything, writers start at once.
        writer = os.fork()
        if writer == 0:
            write(directory, int(start))
        os.write(1, b"writer %d\n" % writer)
        os.waitpid(writer, 0)
        os.write(1, b"gone\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
