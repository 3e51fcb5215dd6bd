"""Ways by which an alert reaches people: W&B, Python's logging, a callable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_gradguard.record.alert import Alert, GradientAlert, Level

logger = logging.getLogger("lightning_gradguard.alerts")
said = logging.getLogger("lightning_gradguard")

_WANDB_LEVELS: dict[Level, str] = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
# W&B takes 0 for its own default of a minute, and nothing that is not finite.
_SHORTEST_WAIT, _LONGEST_WAIT = 0.001, 86400.0


@dataclass(frozen=True)
class AlertChannel:
    """One way to tell people.

    Attributes:
        name: What it is called if it fails.
        deliver: Tells of one alert. It may block: it is called in a thread of its own.
    """

    name: str
    deliver: Callable[[Alert], object]


class WandbRun(Protocol):
    """What is needed of a W&B run."""

    def alert(self, title: str, text: str, level: str, wait_duration: float) -> object:
        """Send an alert."""


def channels_of(settings: GradientAlert, runs: Sequence[WandbRun] = ()) -> list[AlertChannel]:
    """Returns the ways that are asked for.

    Args:
        settings: Which ones.
        runs: W&B runs at hand.
    """
    # The user's own comes last: if it hangs, the others have been told.
    channels = [wandb_channel(run, settings.every_seconds) for run in runs if settings.wandb]
    if settings.log:
        channels.append(AlertChannel("Python's logging", _log))
    if settings.send is not None:
        name = getattr(settings.send, "__qualname__", type(settings.send).__qualname__)
        channels.append(AlertChannel(name, settings.send))
    return channels


def wandb_channel(run: WandbRun, every_seconds: float) -> AlertChannel:
    """Returns the way by the alerts of a W&B run.

    Args:
        run: The run.
        every_seconds: How far apart alerts of one title are.
    """
    # Alerts of one title come here as far apart as they should be, give or take a slow delivery,
    # which must not make W&B drop the second. It is left those of a run that restarts all the time.
    wait = min(max(every_seconds / 2, _SHORTEST_WAIT), _LONGEST_WAIT)

    def deliver(alert: Alert) -> None:
        run.alert(
            title=alert.title,
            text=alert.text,
            level=_WANDB_LEVELS[alert.level],
            wait_duration=wait,
        )

    return AlertChannel("W&B", deliver)


def wandb_runs(loggers: Iterable[Any]) -> list[Any]:
    """The runs of those loggers that can send alerts, which are those of W&B.

    Known by what they can do and not by their type, so that W&B need not be installed.
    """
    runs: dict[int, Any] = {}
    for each in loggers:
        try:
            run = getattr(each, "experiment", None)
        except Exception as error:  # noqa: BLE001 - a logger that fails is no reason not to guard
            said.warning("%s gets no alerts: %s", type(each).__name__, error)
            continue
        if run is not None and callable(getattr(run, "alert", None)):
            runs[id(run)] = run
    return list(runs.values())


def _log(alert: Alert) -> None:
    logger.warning("%s", alert)
