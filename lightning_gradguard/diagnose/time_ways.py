"""Which way the gradient takes back through time, where the recurrence of one layer is not all."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from lightning_gradguard.readings import HORIZON_FACTOR, ModelFacts, TimeReading

_LAYER = re.compile(r"(?:(?P<stack>.+)\.)?(?P<ways>layers|layers_reverse)\.\d+")


def stacks_as_one(readings: Sequence[TimeReading], model: ModelFacts) -> tuple[TimeReading, ...]:
    """Reads the layers of a dilated stack as one module, by the one in which the least is lost.

    Each layer of it hands its input on at the same timestep, so the gradient goes up to the layer
    with the longest steps, back in that one, and down again; that the other layers lose it within a
    few steps is how such a stack is made. Unless all layers could be read, nothing is said of it.

    Args:
        readings: Of one step.
        model: Which stacks there are.
    """
    stacks = set(model.of_kind("dilated"))
    alone, layers = [], dict[tuple[str, str], list[TimeReading]]()
    for reading in readings:
        match = _LAYER.fullmatch(reading.module)
        if match is None or (match["stack"] or "") not in stacks:
            alone.append(reading)
        else:
            layers.setdefault((match["stack"] or "", match["ways"]), []).append(reading)
    known = {name: of for name, of in layers.items() if all(map(_has_rate, of))}
    return (*alone, *(_as_one(*name, of) for name, of in known.items()))


def steps_to_bridge(reading: TimeReading, model: ModelFacts) -> int:
    """Returns how many timesteps the gradient has to be carried back by the recurrence alone.

    All of them, but where attention reads the states: then the loss enters at many timesteps
    directly, and only those before the first of these are left. A loss at each timestep enters
    everywhere too, without being any shorter way to what came long before it, so the model has to
    have attention. A timestep counts if what enters there is a thousandth of the largest or more.

    Args:
        reading: With its ``entry``.
        model: Whether there is attention.

    Example:
        >>> reading = TimeReading("rnn", "l0", "exact", timesteps=4, entry=(0.0, 0.2, 0.2, 0.6))
        >>> steps_to_bridge(reading, ModelFacts()), steps_to_bridge(
        ...     reading, ModelFacts(kinds={"pool": "attention"})
        ... )
        (4, 1)
    """
    entry = reading.entry[::-1] if reading.part.endswith("reverse") else reading.entry
    if not entry or not model.of_kind("attention"):
        return reading.timesteps
    least = max(entry) / HORIZON_FACTOR**2  # shares are of squares
    first = next((at for at, share in enumerate(entry) if share >= least), 0)
    return math.ceil(first * reading.timesteps / len(entry))


def _has_rate(reading: TimeReading) -> bool:
    return math.isfinite(reading.decay_rate)


def _as_one(stack: str, ways: str, layers: Sequence[TimeReading]) -> TimeReading:
    slowest = max(layers, key=lambda reading: reading.decay_rate)
    timesteps = max(reading.timesteps for reading in layers)
    return replace(slowest, module=stack, part=ways, timesteps=timesteps)
