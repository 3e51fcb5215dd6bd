"""How far back the gradient reaches in a model, as the probe measures it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.tasks import SequenceTask

# Sequences of the test set that the loss of a measurement is taken of.
SEQUENCES = 64


@dataclass(frozen=True)
class Span:
    """The reading of a model's slowest layer.

    Attributes:
        rate: Nats per timestep back; NaN where nothing could be measured.
        error: Half width of its interval.
        half_life: Timesteps in which the gradient halves, or doubles.
        horizon: Timesteps in which it changes by 10³.
        part: Which layer that is.
        note: Why there is no rate, or which layers are without one.
    """

    rate: float
    error: float
    half_life: float
    horizon: float
    part: str
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_span(model: nn.Module, task: SequenceTask, device: str = "cpu") -> Span:
    """Measure a model on test sequences, under the task's own loss; leaves no gradients."""
    inputs, targets = task.split("test").batch()
    inputs, targets = inputs[:SEQUENCES].to(device), targets[:SEQUENCES].to(device)
    with TimestepProbe(model) as probe:
        task.loss(model(inputs), targets).backward()
        readings = probe.measure()
    model.zero_grad()
    return slowest(readings)


def slowest(readings: list[TimeReading]) -> Span:
    """The layer with the longest horizon: the gradient can take its way through that one."""
    exact = [r for r in readings if r.source == "exact" and not math.isnan(r.decay_rate)]
    notes = "; ".join(sorted({f"{r.name}: {r.note}" for r in readings if r.note}))
    if not exact:
        return Span(math.nan, math.nan, math.nan, math.nan, "", notes)
    best = max(exact, key=lambda reading: reading.horizon)
    return Span(best.decay_rate, best.decay_error, best.half_life, best.horizon, best.name, notes)
