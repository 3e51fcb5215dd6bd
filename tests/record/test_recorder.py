"""Everybody is told what happened, and nobody twice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lightning_gradguard.diagnose import Finding, Pathology, Remedy, Severity
from lightning_gradguard.record import EventLog, Recorder, StepRecord, read_events
from lightning_gradguard.respond import Action, ActionKind

LEVELS = {
    Severity.INFO: logging.INFO,
    Severity.WARNING: logging.WARNING,
    Severity.CRITICAL: logging.ERROR,
}


def finding(
    step: int = 0, severity: Severity = Severity.WARNING, where: str = "layer", **more: Any
) -> Finding:
    remedy = Remedy("Do this.", "code()")
    message = f"finding {step}"
    return Finding(
        Pathology.EXPLODING, severity, where, step, {"z": 9.0}, message, (remedy,), **more
    )


def action(step: int = 0, kind: ActionKind = ActionKind.SKIP) -> Action:
    return Action(kind, step, f"{kind.value} at {step}", {"total_norm": float("nan")})


def row(step: int) -> StepRecord:
    return StepRecord(step, 1.0, 2.0, 3.0, 1.0, 0.1, 0, False, 1.0)


@pytest.fixture
def console(caplog: Any) -> Any:
    with caplog.at_level(logging.DEBUG, logger="lightning_gradguard"):
        yield caplog


@pytest.mark.parametrize("severity", list(Severity))
def test_a_finding_is_said_once_at_its_level(console: Any, severity: Severity) -> None:
    Recorder().finding(finding(3, severity))
    assert [(r.levelno, r.getMessage()) for r in console.records] == [
        (LEVELS[severity], "finding 3")
    ]


def test_every_cause_is_said(console: Any) -> None:
    recorder = Recorder("optimizer1")
    for step in range(3):
        assert recorder.finding(finding(step, where=f"layer{step}"))
    assert console.messages == [f"[optimizer1] finding {step}" for step in range(3)]
    assert len(recorder.findings) == 3


def test_one_cause_is_one_finding_and_said_again_only_if_it_is_worse(console: Any) -> None:
    recorder = Recorder()
    assert recorder.finding(finding(0, Severity.INFO))
    assert not recorder.finding(finding(1, Severity.WARNING))
    assert not recorder.finding(finding(1, Severity.WARNING, follows_from="underflow in model"))
    assert not recorder.finding(finding(1, Severity.WARNING, until=9))
    assert console.messages == ["finding 0", "finding 1"]
    assert recorder.findings == [finding(1, Severity.WARNING, until=9)]
    # what has healed and comes back is another one
    assert recorder.finding(finding(20))
    assert [f.step for f in recorder.findings] == [1, 20]
    # as is what this rank alone has seen
    assert recorder.finding(finding(21, local=True))


def test_what_follows_from_another_is_said_quietly(console: Any) -> None:
    Recorder().finding(finding(3, follows_from="underflow in model"))
    assert [r.levelno for r in console.records] == [logging.INFO]


ALWAYS_SAID = (ActionKind.STOP, ActionKind.ROLL_BACK)  # a few times in a run at most


@pytest.mark.parametrize("kind", [k for k in ActionKind if k not in ALWAYS_SAID])
def test_actions_of_a_kind_are_said_once(console: Any, kind: ActionKind) -> None:
    recorder = Recorder()
    for step in range(5):
        recorder.action(action(step, kind))
    (message,) = console.messages
    assert message.startswith(f"{kind.value} at 0")
    assert "told once" in message
    assert [a.step for a in recorder.actions] == list(range(5))


def test_a_stop_is_said_without_a_promise_of_more(console: Any) -> None:
    recorder = Recorder()
    recorder.action(action(0, ActionKind.SKIP))
    recorder.action(action(7, ActionKind.STOP))
    assert console.messages[1] == "stop at 7"


def test_silent_says_and_writes_nothing_but_remembers(console: Any, tmp_path: Path) -> None:
    recorder = Recorder(silent=True)
    recorder.events = EventLog(tmp_path / "events.jsonl")
    recorder.finding(finding())
    recorder.action(action())
    recorder.step(row(0))
    assert console.messages == []
    assert list(tmp_path.iterdir()) == []
    assert (len(recorder.findings), len(recorder.actions), len(recorder.history)) == (1, 1, 1)


def test_events_hold_everything(tmp_path: Path) -> None:
    recorder = Recorder("optimizer0")
    recorder.events = EventLog(tmp_path / "events.jsonl")
    recorder.finding(finding(4))
    for step in range(3):
        recorder.action(action(step))
    recorder.step(row(0))
    recorder.events.close()
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [(e["event"], e["step"]) for e in events] == [
        ("finding", 4),
        ("action", 0),
        ("action", 1),
        ("action", 2),
    ]
    assert {e["optimizer"] for e in events} == {"optimizer0"}
    assert events[1]["numbers"] == {"total_norm": "nan"}
    assert Finding.from_dict(events[0]) == finding(4)


def test_memory_is_bounded(tmp_path: Path) -> None:
    recorder = Recorder(max_rows=50, silent=True)
    for step in range(3000):
        recorder.finding(finding(step, where=f"layer{step}"))
        recorder.action(action(step))
        recorder.step(row(step))
    assert [r.step for r in recorder.history] == list(range(2950, 3000))
    assert recorder.last == row(2999)
    for kept in (recorder.findings, recorder.actions):
        steps = [item.step for item in kept]
        assert len(steps) <= 1000
        assert steps == sorted(steps)
        assert steps[:100] == list(range(100)), "how it began is forgotten"
        assert steps[-100:] == list(range(2900, 3000)), "how it ends is forgotten"


def test_history_is_a_copy() -> None:
    recorder = Recorder()
    recorder.step(row(0))
    recorder.history.clear()
    assert recorder.history == [row(0)]
