"""What an earlier run, or another one that is under way, has left in the same place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.record import EventLog, Recorder, StepRecord, read_events
from lightning_gradguard.record.earlier_runs import is_another, this_process
from lightning_gradguard.record.past_events import past_actions, past_findings
from lightning_gradguard.record.run_files import write_info
from lightning_gradguard.record.run_history import RunInfo
from lightning_gradguard.record.run_reader import RunError, read_run
from lightning_gradguard.record.run_writer import RunWriter

ROW = StepRecord(0, 2.5, 0.5, 1.0, 1.0, 0.1, 0, False, 1.0)


@pytest.fixture
def process() -> Iterator[str]:
    """One that lives, as long as the test."""
    waits = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield f"{socket.gethostname()}:{waits.pid}"
    waits.communicate(b"\n")


def earlier_run(directory: Path, info: RunInfo) -> None:
    writer = RunWriter(directory, RunInfo())
    writer.steps("", [ROW])
    writer.close()
    (directory / "report.html").write_text("of the earlier run", encoding="utf-8")
    write_info(directory / "history" / "run.json", info)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere it is not asked")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_under_way_elsewhere_keeps_its_place(
    tmp_path: Path, process: str, resumed: bool
) -> None:
    earlier_run(tmp_path, RunInfo("first", process=process))
    writer = RunWriter(tmp_path, RunInfo("second"), resumed=resumed)
    writer.steps("", [replace(ROW, step=1)])
    with pytest.raises(OSError, match="under way in another process"):
        writer.flush()
    writer.close()
    run = read_run(tmp_path)
    assert run.info.name == "first"
    assert list(run.optimizers[0].steps["step"]) == [0]


@pytest.mark.parametrize(
    "info",
    [
        RunInfo("first", process=this_process()),
        RunInfo("first", process="another-machine:1"),
        RunInfo("first", process=f"{socket.gethostname()}:999999999"),
        RunInfo("first", process="damaged"),
    ],
)
def test_one_that_was_killed_is_put_aside_with_its_report(tmp_path: Path, info: RunInfo) -> None:
    earlier_run(tmp_path, info)
    writer = RunWriter(tmp_path, RunInfo("second"))
    writer.steps("", [ROW, replace(ROW, step=1)])
    writer.close()
    assert len(read_run(tmp_path).optimizers[0].steps["step"]) == 2
    assert read_run(tmp_path / "history-1").info.name == "first"
    aside = tmp_path / "history-1" / "report.html"
    assert aside.read_text(encoding="utf-8") == "of the earlier run"
    assert not (tmp_path / "report.html").exists()


def test_a_process_that_has_ended_is_no_other(process: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not is_another(f"{socket.gethostname()}:{ended.pid}")
    assert is_another(process) is (os.name == "posix")


SPIKE = Finding(Pathology.LOSS_SPIKE, Severity.WARNING, "loss", 7, {"z": 9.0}, "A jump")


def event(name: str, **values: Any) -> dict[str, Any]:
    return {"event": name, **values}


def test_what_came_after_the_checkpoint_is_taken_back() -> None:
    found = event("finding", **SPIKE.to_dict())
    later = event("finding", **replace(SPIKE, where="model", step=12).to_dict())
    skip = {"kind": "skip", "message": "Dropped.", "numbers": {}}
    events = [
        found,
        event("action", step=8, **skip),
        later,
        event("action", step=12, **skip),
        event("resumed", step=10),
        event("action", step=11, **skip),
    ]
    assert past_findings(events) == (SPIKE,)
    assert [action.step for action in past_actions(events)] == [8, 11]


def test_one_that_healed_after_the_checkpoint_is_open_again(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.events = EventLog(tmp_path / "events.jsonl")
    recorder.finding(SPIKE)
    recorder.finding(replace(SPIKE, until=20))
    again = Recorder()
    again.events = recorder.events
    again.resume(10)
    again.adopt([SPIKE])
    recorder.events.close()
    assert past_findings(read_events(tmp_path / "events.jsonl")) == (SPIKE,)


def test_a_healthy_run_that_is_resumed_writes_no_event(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.events = EventLog(tmp_path / "events.jsonl")
    recorder.resume(10)
    recorder.adopt([])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizers", ["[1]", "3", '{"a": 1}'])
def test_a_damaged_description_is_said_to_be(tmp_path: Path, optimizers: str) -> None:
    folder = tmp_path / "gradguard" / "history"
    folder.mkdir(parents=True)
    text = f'{{"schema": 1, "optimizers": {optimizers}}}'
    (folder / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match="is no value of optimizers"):
        read_run(tmp_path)
