"""Appends numbered events to a file; a test kills it on the way."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_gradguard.record import EventLog

MOST_EVENTS = 2000  # some 20 MB, in case nobody kills it


def main(path: Path) -> None:
    log = EventLog(path, max_bytes=10**9)
    for number in range(MOST_EVENTS):
        log.write("action", {"number": number, "message": "x" * (number * 37 % 20_000)})
        print(number, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
