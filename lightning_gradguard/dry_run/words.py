"""What to look at, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_gradguard.diagnose import Thresholds
from lightning_gradguard.measure.depth import DepthSlope
from lightning_gradguard.readings import HORIZON_FACTOR, TimeReading

_SYMPTOM = "That is a symptom, not yet a fault"
_MOST_NAMES = 3


def time_notes(readings: Iterable[TimeReading], thresholds: Thresholds) -> list[str]:
    """A sentence on the gradients that vanish through time beyond their error, and one on others.

    Sequences too short to say so are left out.
    """
    vanishing, exploding = [], []
    for reading in readings:
        rate, steps = reading.decay_rate, reading.timesteps
        if steps < thresholds.least_timesteps or not math.isfinite(rate):
            continue
        error = reading.decay_error if math.isfinite(reading.decay_error) else 0.0
        if -(rate + error) * thresholds.short_horizon * steps > math.log(HORIZON_FACTOR):
            vanishing.append(reading)
        elif (rate - error) * steps > thresholds.growth:
            exploding.append(reading)
    return [*_vanishing(vanishing), *_exploding(exploding)]


def depth_notes(depth: DepthSlope, thresholds: Thresholds) -> list[str]:
    """A sentence if the gradient changes by orders of magnitude through the layers."""
    change = (abs(depth.slope) - depth.error) * (depth.layers - 1)
    if not change > thresholds.growth:
        return []
    verb = "shrinks" if depth.slope < 0 else "grows"
    note = (
        f"Relative to the weights, the gradient {verb} by {_decades(depth.slope, depth.layers)} on "
        f"its way back through {depth.layers} layers. {_SYMPTOM}: look at whether the first layers "
        "learn as much as the last ones, and at normalization, residual connections and the "
        "initialization if they do not."
    )
    return [note]


def loss_notes(losses: Sequence[float]) -> list[str]:
    """A sentence on each loss that is not finite."""
    return [
        f"The loss of batch {index} is {loss}: look at this batch and at the initial weights."
        for index, loss in enumerate(losses)
        if not math.isfinite(loss)
    ]


def missing_notes(unwatched: Mapping[str, str], without_gradient: Sequence[str]) -> list[str]:
    """Sentences on modules that cannot be watched and parameters that the loss does not reach."""
    notes = [f"{reason}." for reason in unwatched.values()]
    if without_gradient:
        names = ", ".join(f"`{name}`" for name in without_gradient[:_MOST_NAMES])
        rest = len(without_gradient) - _MOST_NAMES
        more = f" and {rest} more" if rest > 0 else ""
        notes.append(f"The loss gives no gradient to {names}{more}: look at whether it should.")
    return notes


def _vanishing(readings: Sequence[TimeReading]) -> list[str]:
    if not readings:
        return []
    places = [f"{_horizon(r)} of {r.timesteps} steps in `{r.name}`" for r in readings]
    note = (
        f"The gradient reaches {_listed(places)}. {_SYMPTOM}: look at whether the task needs a "
        "longer memory, and at whether the reach grows in training, as it often does by itself."
    )
    return [note]


def _exploding(readings: Sequence[TimeReading]) -> list[str]:
    if not readings:
        return []
    places = [
        f"{_decades(r.decay_rate, r.timesteps)} over {r.timesteps} steps in `{r.name}`"
        for r in readings
    ]
    note = (
        f"The gradient grows by {_listed(places)}. {_SYMPTOM}: look at the gradient norm of the "
        "first training steps, which clipping and smaller recurrent weights keep in bounds."
    )
    return [note]


def _horizon(reading: TimeReading) -> str:
    return f"{reading.horizon:.0f}" if reading.horizon >= 1.0 else "less than 1"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _decades(rate: float, steps: int) -> str:
    return f"{abs(rate) * (steps - 1) / math.log(10.0):.0f} orders of magnitude"
