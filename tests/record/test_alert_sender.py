"""Alerts are rare, and nobody waits for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.record import Alert, AlertChannel, AlertSender, GradientAlert, Recorder
from lightning_gradguard.record.alert_sender import Throttle
from lightning_gradguard.respond import Action, ActionKind
from tests.record.test_alert import action, finding

STOP = action(ActionKind.STOP)
SOON = 10.0  # seconds within which a thread has certainly had its turn


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Hanging:
    """A receiver that does not come back until it is released."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        self.told: list[Alert] = []

    def __call__(self, alert: Alert) -> None:
        self.entered.set()
        self.release.wait()
        self.told.append(alert)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    receiver = Hanging()
    yield receiver
    receiver.release.set()


def sender_to(
    receiver: Callable[[Alert], object], clock: Callable[[], float] | None = None, **settings: Any
) -> tuple[AlertSender, Recorder]:
    sender = AlertSender(
        GradientAlert(**settings), [AlertChannel("test", receiver)], clock or Clock()
    )
    recorder = Recorder()
    sender.listen(recorder)
    return sender, recorder


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gradguard-alerts"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert holds()


# -- how often ------------------------------------------------------------------------------------


@given(
    events=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 50.0)), max_size=60),
    every_seconds=st.floats(0.0, 60.0),
    max_alerts=st.integers(1, 12),
)
def test_the_throttle_keeps_its_distance_its_limit_and_its_count(events, every_seconds, max_alerts):
    throttle = Throttle(every_seconds, max_alerts)
    now, told = 0.0, 0
    last: dict[str, float] = {}
    for number, (title, later) in enumerate(events, 1):
        now += later
        due = title not in last or now - last[title] >= every_seconds
        held = throttle.admit(title, now)
        assert (held is not None) == (due and throttle.sent - (held is not None) < max_alerts)
        if held is not None:
            last[title] = now
            told += held
        # each one was sent, was told of with a later one, or is still held back
        assert throttle.sent + told + throttle.held == number
    assert throttle.sent <= max_alerts


@given(st.lists(st.sampled_from("ab"), max_size=40))
def test_those_held_back_are_told_with_the_next_of_their_own_title(titles):
    throttle = Throttle(every_seconds=10.0, max_alerts=100)
    for title in titles:
        throttle.admit(title, 0.0)
    for title in "ab":
        count = titles.count(title)
        assert throttle.admit(title, 10.0) == max(count - 1, 0)


def test_a_repetition_is_held_back_and_counted_with_the_next():
    clock, told = Clock(), []
    sender, recorder = sender_to(told.append, clock, every_seconds=60.0, actions=("skip",))
    for clock.now in (0.0, 1.0, 59.0, 60.0, 61.0):
        recorder.action(action(ActionKind.SKIP))
    sender.close()
    assert [alert.suppressed for alert in told] == [0, 2]
    assert "held back since the last: 2" in told[1].text
    assert sender.suppressed == 1


def test_no_more_than_the_most_are_sent(caplog):
    told: list[Alert] = []
    sender, recorder = sender_to(told.append, every_seconds=0.0, max_alerts=3)
    for _ in range(10):
        recorder.action(STOP)
    with caplog.at_level(logging.INFO, logger="lightning_gradguard"):
        sender.close()
    assert len(told) == 3
    assert "held back: 7" in caplog.text


# -- what is heard --------------------------------------------------------------------------------


def test_a_finding_is_told_when_it_opens_and_when_it_turns_worse():
    told: list[Alert] = []
    sender, recorder = sender_to(told.append, every_seconds=0.0, min_severity="info")
    for severity, until in (
        (Severity.INFO, None),
        (Severity.INFO, None),
        (Severity.CRITICAL, None),
        (Severity.WARNING, None),
        (Severity.WARNING, 90),
        (Severity.WARNING, None),  # it has come back
    ):
        recorder.finding(finding(severity=severity, until=until))
    sender.close()
    assert [alert.level for alert in told] == ["info", "critical", "warning"]


def test_what_outlasts_the_nan_that_explained_it_is_told_then():
    told: list[Alert] = []
    sender, recorder = sender_to(told.append)
    recorder.finding(finding(Pathology.NON_FINITE, Severity.CRITICAL))
    recorder.finding(finding(Pathology.DIVERGING, follows_from="non_finite in rnn"))
    recorder.finding(finding(Pathology.DIVERGING))
    recorder.finding(finding(Pathology.DIVERGING))
    sender.close()
    assert [alert.title for alert in told] == [
        "GradGuard: NaN or Inf in training",
        "GradGuard: loss diverges",
    ]


def test_what_a_resumed_run_had_open_is_not_told_again():
    told: list[Alert] = []
    sender, recorder = sender_to(told.append)
    recorder.adopt([finding()])
    recorder.finding(finding())
    assert threads() == []
    recorder.finding(finding(severity=Severity.CRITICAL))
    sender.close()
    assert [alert.level for alert in told] == ["critical"]


def test_a_silent_recorder_alerts_nobody():
    told: list[Alert] = []
    sender = AlertSender(GradientAlert(), [AlertChannel("test", told.append)])
    recorder = Recorder(silent=True)
    sender.listen(recorder)
    recorder.finding(finding())
    recorder.action(STOP)
    sender.close()
    assert told == []


def test_optimizers_share_one_limit_and_are_named():
    told: list[Alert] = []
    sender = AlertSender(GradientAlert(), [AlertChannel("test", told.append)])
    recorders = [Recorder("optimizer0"), Recorder("optimizer1")]
    for recorder in recorders:
        sender.listen(recorder)
    recorders[1].finding(finding())
    recorders[0].finding(finding())
    sender.close()
    (alert,) = told
    assert "Optimizer: optimizer1" in alert.text


# -- delivery -------------------------------------------------------------------------------------


def test_a_hanging_receiver_holds_up_nobody(hanging, caplog):
    sender, recorder = sender_to(hanging, every_seconds=0.0)
    recorder.action(STOP)
    assert hanging.entered.wait(SOON)
    recorder.action(STOP)  # returns while the first is under way
    began = time.monotonic()
    sender.close(timeout=0.2)
    assert 0.2 <= time.monotonic() - began < SOON
    assert hanging.told == []
    assert "not delivered within 0.2 s: 2" in caplog.text
    began = time.monotonic()
    sender.close(timeout=SOON)
    assert time.monotonic() - began < SOON / 2, "closed twice, it waits twice"
    (thread,) = threads()
    assert thread.daemon, "the process could not end"


def test_what_finds_no_room_is_counted_and_what_waits_is_bounded(hanging):
    sender, recorder = sender_to(hanging, every_seconds=0.0, max_alerts=1000)
    recorder.action(STOP)
    assert hanging.entered.wait(SOON)
    for _ in range(500):
        recorder.action(STOP)
    assert sender.suppressed == 500 - 32
    hanging.release.set()
    wait_until(lambda: threads() == [])
    recorder.action(STOP)
    sender.close()
    assert [alert.suppressed for alert in hanging.told] == [0] * 33 + [500 - 32]


def test_a_slow_receiver_is_given_time_at_the_end():
    told: list[Alert] = []

    def slow(alert: Alert) -> None:
        time.sleep(0.1)
        told.append(alert)

    sender, recorder = sender_to(slow, every_seconds=0.0)
    for _ in range(3):
        recorder.action(STOP)
    sender.close()
    assert len(told) == 3


def test_a_failing_receiver_is_logged_once_and_used_no_more(caplog):
    calls: list[Alert] = []
    told: list[Alert] = []

    def fails(alert: Alert) -> None:
        calls.append(alert)
        raise ConnectionError("no route to host")

    channels = [AlertChannel("mine", fails), AlertChannel("other", told.append)]
    sender = AlertSender(GradientAlert(every_seconds=0.0), channels)
    recorder = Recorder(silent=False)
    sender.listen(recorder)
    for _ in range(4):
        recorder.action(STOP)
    sender.close()
    assert len(calls) == 1
    assert len(told) == 4
    (record,) = [r for r in caplog.records if r.exc_info]
    assert "no longer sent by mine" in record.getMessage()
    assert isinstance(record.exc_info[1], ConnectionError)


def test_there_is_a_thread_only_while_there_is_something_to_tell(hanging):
    sender, recorder = sender_to(hanging, every_seconds=0.0)
    assert threads() == []
    for _ in range(5):
        recorder.action(STOP)
    assert len(threads()) == 1
    hanging.release.set()
    wait_until(lambda: threads() == [])
    recorder.action(STOP)
    sender.close()
    assert len(hanging.told) == 6


def test_a_system_without_a_thread_left_trains_on(monkeypatch, caplog):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    sender, recorder = sender_to(print, every_seconds=0.0)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    recorder.action(STOP)
    recorder.action(STOP)
    sender.close()
    assert caplog.text.count("Alerts are off, because no thread can be started") == 1


def test_after_it_was_closed_nothing_is_heard():
    told: list[Alert] = []
    sender, recorder = sender_to(told.append)
    heard: list[Finding | Action] = []
    recorder.listeners.append(heard.append)
    sender.close()
    recorder.action(STOP)
    assert told == []
    assert recorder.listeners == [heard.append]
    assert heard == [STOP], "another listener was taken off too"
