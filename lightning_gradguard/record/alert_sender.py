"""Alerts on their way: how often they are sent, and by a thread that training never waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.record.alert import Alert, GradientAlert, alert_of, title_of
from lightning_gradguard.record.alert_channels import AlertChannel
from lightning_gradguard.record.recorder import Recorder
from lightning_gradguard.respond.actions import Action

logger = logging.getLogger("lightning_gradguard")

# One of every title, and then some: it fills up only if sending hangs.
_MOST_PENDING = 32


class Throttle:
    """Decides whether an alert may be sent now, and counts those that may not.

    Args:
        every_seconds: Seconds after one of a title in which no other of it is sent.
        max_alerts: Most alerts of all titles together.

    Attributes:
        sent: How many may have been sent.

    Example:
        >>> throttle = Throttle(every_seconds=300, max_alerts=100)
        >>> [throttle.admit("loss spike", now) for now in (0, 10, 20, 300)]
        [0, None, None, 2]
    """

    def __init__(self, every_seconds: float, max_alerts: int) -> None:
        self.every_seconds = every_seconds
        self.max_alerts = max_alerts
        self.sent = 0
        self._last: dict[str, float] = {}
        self._held: dict[str, int] = {}

    @property
    def held(self) -> int:
        """How many were held back and have not been told with a later one."""
        return sum(self._held.values())

    def admit(self, title: str, now: float) -> int | None:
        """Returns how many of this title were held back since the last, or ``None`` to hold it.

        Args:
            title: Of the alert.
            now: Seconds by a clock that never goes back.
        """
        last = self._last.get(title)
        if self.sent >= self.max_alerts or (last is not None and now - last < self.every_seconds):
            self.hold(title)
            return None
        self.sent += 1
        self._last[title] = now
        return self._held.pop(title, 0)

    def hold(self, title: str) -> None:
        """Count one that is not sent."""
        self._held[title] = self._held.get(title, 0) + 1


class AlertSender:
    """Turns what recorders hear into alerts and delivers them, however long that takes.

    Alerts wait in a bounded queue for a daemon thread, which begins with the first of them and ends
    when none is left: a run that alerts nobody, or has done so, has no thread more. A channel that
    raises is logged once and used no more.

    Args:
        settings: Who is told of what.
        channels: By which ways.
        clock: Seconds, never going back. Default: the system's.

    Example:
        >>> from lightning_gradguard.respond import ActionKind
        >>> told = []
        >>> recorder = Recorder()
        >>> sender = AlertSender(GradientAlert(), [AlertChannel("a list", told.append)])
        >>> sender.listen(recorder)
        >>> recorder.action(Action(ActionKind.STOP, 90, "Stopping at step 90."))
        >>> sender.close()
        >>> [alert.title for alert in told]
        ['GradGuard: run is stopped']
    """

    def __init__(
        self,
        settings: GradientAlert,
        channels: Sequence[AlertChannel],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._channels = list(channels)
        self._clock = clock
        self._throttle = Throttle(settings.every_seconds, settings.max_alerts)
        self._pending: deque[Alert] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._stop_listening: list[Callable[[], None]] = []

    @property
    def suppressed(self) -> int:
        """How many alerts were held back and have not been told with a later one."""
        return self._throttle.held

    def listen(self, recorder: Recorder) -> None:
        """Tell people of what this recorder hears from now on, until :meth:`close`.

        Args:
            recorder: Of one optimizer. A silent one, as on all ranks but one, says nothing.
        """
        listener = partial(self._hear, recorder)
        recorder.listeners.append(listener)
        self._stop_listening.append(partial(recorder.listeners.remove, listener))

    def close(self, timeout: float = 2.0) -> None:
        """Listen no more, and wait until what is pending has been delivered.

        Args:
            timeout: Seconds after which what is left is given up. Default 2: enough for a message
                to a server, and less than anyone notices at the end of a run.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        for stop in self._stop_listening:
            stop()
        self._stop_listening.clear()
        if thread is not None:
            thread.join(timeout)
        with self._lock:
            left = len(self._pending) + (self._thread is not None)
            self._pending.clear()
        if left:
            logger.warning(
                "Alerts that were not delivered within %g s: %d; the report has what they tell.",
                timeout,
                left,
            )
        if self.suppressed:
            logger.info("Alerts that were held back: %d; the report has all.", self.suppressed)

    def _hear(self, recorder: Recorder, event: Finding | Action) -> None:
        if not self.settings.wants(event, recorder.findings):
            return
        title = title_of(event)
        with self._lock:
            if self._closed or not self._channels:
                return
            if len(self._pending) >= _MOST_PENDING:
                self._throttle.hold(title)
                return
            held = self._throttle.admit(title, self._clock())
            if held is None:
                return
            self._pending.append(alert_of(event, recorder.label, held))
            if self._thread is None or not self._thread.is_alive():
                self._start_thread()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(
            target=self._deliver_pending, name="gradguard-alerts", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no thread left, or the process is ending
            self._thread = None
            self._pending.clear()
            self._channels.clear()
            logger.warning("Alerts are off, because no thread can be started: %s", error)

    def _deliver_pending(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._thread = None
                    return
                alert = self._pending.popleft()
            for channel in list(self._channels):
                self._deliver(channel, alert)

    def _deliver(self, channel: AlertChannel, alert: Alert) -> None:
        try:
            channel.deliver(alert)
        except Exception:
            logger.exception(
                "Alerts are no longer sent by %s, because it failed; training goes on.",
                channel.name,
            )
            self._channels.remove(channel)
