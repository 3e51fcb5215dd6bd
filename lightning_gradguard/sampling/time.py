"""When to measure how gradients travel through time, and when the readings are on the host."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from torch import nn

from lightning_gradguard._validation import check_number
from lightning_gradguard.measure.readback import PendingRead
from lightning_gradguard.measure.timesteps import Snapshot, TimestepProbe
from lightning_gradguard.readings import TimeReading

logger = logging.getLogger("lightning_gradguard")

# What to watch: all that is found, names or patterns, or names with their time axis.
TimeModules = Literal["auto"] | Sequence[str] | Mapping[str, int]

# Of the run, both together are at most 1% (`python -m benchmarks timesteps`): an exact measurement
# costs 0.6 to 1.6 training steps, a cheap one with its reading up to a quarter of one.
EXACT_EVERY_N_STEPS = 300
CHEAP_EVERY_N_STEPS = 50
# Steps between two exact measurements that a detector has asked for, and that a cheap one has:
# early in training rates change all the time, and the one percent must hold there too.
_LEAST_GAP = 20
_DRIFT_GAP = 150
# Share of its rate by which a module has to have changed to be worth an exact measurement.
_DRIFT = 0.25


class TimeSampler:
    """Runs a probe over the training of one optimizer.

    Exact measurements are made on the first step, every ``exact_every_n_steps`` steps, on the next
    one once :meth:`request` has been called, and when the cheap one, every 50 steps in between, has
    drifted from the last. On all other steps the hooks sleep.

    Args:
        model: The model.
        parameters: Those that the optimizer trains; modules without any of them are not watched.
        modules: What to watch.
        exact_every_n_steps: Steps between exact measurements.
        delay: Steps until a reading is on the host.
        silent: Do not say what cannot be watched (for all ranks but one).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or a name matches no module.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Collection[nn.Parameter],
        modules: TimeModules,
        exact_every_n_steps: int,
        delay: int,
        *,
        silent: bool = False,
    ) -> None:
        check_number("exact_every_n_steps", exact_every_n_steps, at_least=1, integer=True)
        self.exact_every_n_steps = exact_every_n_steps
        self._model, self._modules = model, modules
        self._probe = TimestepProbe(model, modules, parameters=parameters, on_error=self._fail)
        self._next_exact = 0
        self._last_exact = -_LEAST_GAP
        self._upcoming = 0
        self._delay = delay
        self._late: deque[_Late] = deque()
        self._told: set[str] = set()
        self._silent = silent
        self._references: dict[str, tuple[float, float]] = {}
        self.active = True
        self._announce()
        self._arm()

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the watched modules."""
        return self._probe.names

    def follow(self, parameters: Collection[nn.Parameter]) -> None:
        """Watch the modules of other parameters: groups can be added at any time."""
        if self.active:
            self._probe.close()
            self._probe = TimestepProbe(
                self._model, self._modules, parameters=parameters, on_error=self._fail
            )
            self._announce()
            self._arm()

    def pause(self) -> None:
        """See nothing until :meth:`resume`: evaluation may take gradients too."""
        self._probe.watching = False

    def resume(self) -> None:
        """See the forward passes of the next step again."""
        if self.active:
            self._probe.discard()
            self._arm()

    def _arm(self) -> None:
        """Prepare for the forward passes of the next step."""
        self._probe.exact = self._upcoming >= self._next_exact
        self._probe.watching = self._probe.exact or self._upcoming % CHEAP_EVERY_N_STEPS == 0

    def request(self, step: int) -> None:
        """Ask for an exact measurement soon after ``step``."""
        due = max(step + 1, self._last_exact + _LEAST_GAP)
        self._next_exact = min(self._next_exact, due)
        self._arm()

    def sample(self, step: int, scale: float = 1.0) -> tuple[TimeReading, ...]:
        """Take what the backward passes of ``step`` have left; returns the readings that are due.

        Call it before the weights change: the exact measurement needs those of the forward pass.

        Args:
            step: The step.
            scale: By what the gradients were multiplied, as by a gradient scaler.
        """
        if not self.active:
            return ()
        try:
            return self._sample(step, scale)
        except Exception as error:  # noqa: BLE001 - the rest of the guard goes on
            self._fail(error)
            return ()

    def _sample(self, step: int, scale: float) -> tuple[TimeReading, ...]:
        exact = self._probe.exact
        if self._probe.watching:
            self._late.append(_OnItsWay(step, self._probe.collect(), scale))
            self._announce()
        if exact:
            self._references.clear()
            self._last_exact = step
            self._next_exact = step + self.exact_every_n_steps
        self._upcoming = step + 1
        self._arm()
        due: list[TimeReading] = []
        while self._late and self._late[0].step + self._delay <= step:
            due += self._late.popleft().readings()
        drifted = [self._has_drifted(reading) for reading in due]
        if any(drifted):
            self.request(step)
        return tuple(due)

    def _has_drifted(self, reading: TimeReading) -> bool:
        """Whether a cheap reading is far from what was measured when it was last exact."""
        if not math.isfinite(reading.decay_rate):
            return False
        error = reading.decay_error if math.isfinite(reading.decay_error) else 0.0
        name = reading.module
        if reading.source == "exact":
            # Of several layers no one's rate is that of the module: begin with its next reading.
            one = reading.part in ("", "l0") and name not in self._references
            self._references[name] = (reading.decay_rate, error) if one else (math.nan, 0.0)
            return False
        rate, margin = self._references.setdefault(name, (math.nan, 0.0))
        if math.isnan(rate):
            self._references[name] = (reading.decay_rate, error)
            return False
        change = abs(reading.decay_rate - rate)
        far = change > max(_DRIFT * abs(rate), error + margin, 1.0 / reading.timesteps)
        return far and reading.step >= self._last_exact + _DRIFT_GAP

    def discard(self) -> None:
        """Forget what the backward passes since the last step have left."""
        self._probe.discard()

    def drain(self) -> tuple[TimeReading, ...]:
        """Wait for the readings that are not due yet."""
        late, self._late = self._late, deque()
        try:
            return tuple(reading for entry in late for reading in entry.readings())
        except Exception as error:  # noqa: BLE001 - nothing else is to be lost with them
            self._fail(error)
            return ()

    def close(self) -> None:
        """Take all hooks off the model."""
        self.active = False
        self._probe.close()

    def _fail(self, error: Exception) -> None:
        """A hook of ours must not end the forward or backward pass that it is in."""
        if self.active:
            logger.error(
                "GradGuard stops watching gradients through time because of an internal error "
                "(%s: %s); everything else goes on.",
                type(error).__name__,
                error,
                exc_info=error,
            )
        self.close()

    def _announce(self) -> None:
        new = {n: reason for n, reason in self._probe.unwatched.items() if n not in self._told}
        self._told.update(new)
        if new and not self._silent:
            logger.warning("Not watched through time: %s.", "; ".join(new.values()))

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues at the same steps."""
        return {
            "next_exact": self._next_exact,
            "last_exact": self._last_exact,
            "references": {name: list(pair) for name, pair in self._references.items()},
            "late": [
                {"step": entry.step, "readings": [r.to_dict() for r in entry.readings()]}
                for entry in self._late
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from a saved state at ``step``."""
        self._next_exact, self._last_exact = state["next_exact"], state["last_exact"]
        self._references = {name: (a, b) for name, (a, b) in state["references"].items()}
        self._late = deque(
            _Restored(late["step"], [TimeReading.from_dict(values) for values in late["readings"]])
            for late in state["late"]
        )
        self._upcoming = step
        self._arm()


class _Late(Protocol):
    """Readings of a step that are not due yet."""

    step: int

    def readings(self) -> list[TimeReading]:
        """Wait for them."""


class _OnItsWay:
    def __init__(self, step: int, snapshot: Snapshot, scale: float) -> None:
        self.step = step
        self._snapshot = snapshot
        self._scale = scale
        self._values = PendingRead(snapshot.values)

    def readings(self) -> list[TimeReading]:
        return [
            replace(
                reading,
                step=self.step,
                profile=tuple(norm / self._scale for norm in reading.profile),
            )
            for reading in self._snapshot.decode(self._values.wait())
        ]


class _Restored:
    def __init__(self, step: int, readings: list[TimeReading]) -> None:
        self.step = step
        self._readings = readings

    def readings(self) -> list[TimeReading]:
        return self._readings
