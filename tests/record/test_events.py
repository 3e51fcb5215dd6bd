"""The event log is complete up to the last event, whatever happens to the process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.record import EventLog, read_events

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
ROW = st.dictionaries(st.text(min_size=1), VALUES, max_size=4)


def expected(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {True: "nan"}.get(math.isnan(value), "inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: expected(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expected(item) for item in value]
    return value


@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_what_is_written_is_read_and_every_line_is_json(
    rows: list[dict[str, Any]], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    log = EventLog(path)
    for row in rows:
        log.write("finding", row)
    log.close()
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    events = [
        {k: v for k, v in event.items() if k not in ("event", "schema")}
        for event in read_events(path)
    ]
    keep = [{k: v for k, v in row.items() if k not in ("event", "schema")} for row in rows]
    assert events == expected(keep)


def test_without_events_there_is_no_file(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "gradguard" / "events.jsonl")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_it_only_appends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    before = b""
    for run in range(3):
        log = EventLog(path)
        for number in range(3):
            log.write("action", {"run": run, "number": number})
            now = path.read_bytes()
            assert now.startswith(before), "an earlier line was changed"
            assert now.endswith(b"\n"), "not on disk when write returned"
            before = now
        log.close()
        log.close()
        log.write("action", {"run": run, "number": 3})
        before = path.read_bytes()
        log.close()
    assert len(list(read_events(path))) == 12


@pytest.mark.parametrize(
    "tail",
    [
        b"{",
        b'{"event": "action", "numb',
        b'{"event": "action", "message": "\xc3',
        b'{"event": "action"}',
        b"\x00" * 10,
    ],
    ids=["brace", "key", "inside a character", "only the newline missing", "zeros"],
)
def test_a_half_line_is_not_continued(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("action", {"number": 0})
    log.close()
    with path.open("ab") as file:
        file.write(tail)
    for number in (1, 2):
        log = EventLog(path)
        log.write("action", {"number": number})
        log.close()
    numbers = [event["number"] for event in read_events(path) if "number" in event]
    assert numbers == [0, 1, 2]
    assert path.read_bytes().count(b"\n") == 4


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """Killed after some number of events, in the middle of whatever it does; then once more."""
    path = tmp_path / "events.jsonl"
    told: list[int] = []
    command = [sys.executable, str(Path(__file__).with_name("writer.py")), str(path)]
    for lines in (3, 150):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert process.stdout is not None
        for _ in range(lines):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split(b"\n")
        process.wait()
        process.stdout.close()
        told.append(max([last, *(int(n) for n in rest[:-1] if n)]))
    runs: list[list[int]] = []
    for event in read_events(path):
        if event["number"] == 0:
            runs.append([])
        runs[-1].append(event["number"])
        assert event["message"] == "x" * (event["number"] * 37 % 20_000)
    assert len(runs) == 2
    for run, last in zip(runs, told, strict=True):
        assert run == list(range(len(run)))
        assert len(run) > last, "an event that was written is lost"


def test_a_writer_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        EventLog(tmp_path / "file" / "events.jsonl").write("action", {})
