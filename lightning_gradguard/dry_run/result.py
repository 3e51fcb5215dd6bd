"""What the batches before training have shown."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning_gradguard.measure.depth import DepthSlope
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.time_table import format_time_table

_NO_TIME = "no recurrence was measured, so there is nothing to show"


@dataclass(frozen=True)
class Preflight:
    """How gradients travel through a model before its first step; as text, a table for people.

    Attributes:
        time: One reading for each layer and direction of each recurrent module.
        depth: Slope of the relative gradient norm on the layers, back from the output.
        loss: Loss of each batch.
        notes: What to look at, and what could not be measured, in sentences.

    Example:
        >>> rnn = TimeReading("rnn", "l0", "exact", timesteps=50, decay_rate=-0.2, steps=49)
        >>> print(Preflight((rnn,), DepthSlope(-0.1, 0.05, 4), (2.31, 2.29)))
        Preflight of 2 batches, no step taken; loss 2.31, 2.29
        <BLANKLINE>
        Gradient through time
        module   T  per step  half-life   reaches  recent tenth   from
        rnn/l0  50    -0.200        3.5  35 of 50             -  exact
        <BLANKLINE>
        Gradient through depth
        -0.100 ± 0.050 nats per layer back from the output, over 4 layers
        <BLANKLINE>
        What to look at
        - Nothing stands out.
    """

    time: tuple[TimeReading, ...]
    depth: DepthSlope
    loss: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {
            "time": [reading.to_dict() for reading in self.time],
            "depth": asdict(self.depth),
            "loss": list(self.loss),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        count = f"{len(self.loss)} batch{'es' if len(self.loss) != 1 else ''}"
        losses = ", ".join(f"{loss:.4g}" for loss in self.loss)
        return "\n".join(
            [
                f"Preflight of {count}, no step taken; loss {losses}",
                "",
                "Gradient through time",
                format_time_table(self.time) if self.time else _NO_TIME,
                "",
                "Gradient through depth",
                self._depth_line(),
                "",
                "What to look at",
                *[f"- {note}" for note in self.notes or ("Nothing stands out.",)],
            ]
        )

    def _depth_line(self) -> str:
        if math.isnan(self.depth.slope):
            return "not known, as fewer than three layers have a gradient"
        return (
            f"{self.depth.slope:+.3f} ± {self.depth.error:.3f} nats per layer back from the "
            f"output, over {self.depth.layers} layers"
        )
