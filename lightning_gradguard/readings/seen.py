"""What has become known with a step, beside its loss and its total gradient norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_gradguard.readings.layers import Inspection, NonFiniteOrigin
from lightning_gradguard.readings.time import TimeReading


@dataclass(frozen=True)
class Seen:
    """What was measured now and then; on a device it is known some steps after it was measured.

    Attributes:
        time: Readings through time.
        inspection: A look at every layer.
        lr: Learning rate of the first group, as the schedule sets it; NaN if not known.
        new_phase: Whether the run changed course before this step.
        origin: Where NaN or Inf first appeared, if that was looked for.
    """

    time: tuple[TimeReading, ...] = ()
    inspection: Inspection | None = None
    lr: float = math.nan
    new_phase: bool = False
    origin: NonFiniteOrigin | None = None

    def with_origin(self, origin: NonFiniteOrigin) -> Seen:
        """The same, and where NaN or Inf first appeared."""
        return replace(self, origin=origin)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "time": [reading.to_dict() for reading in self.time],
            "inspection": self.inspection and self.inspection.to_dict(),
            "lr": self.lr,
            "new_phase": self.new_phase,
            "origin": self.origin and self.origin.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Seen:
        """The inverse of :meth:`to_dict`."""
        inspection, origin = values["inspection"], values["origin"]
        return cls(
            time=tuple(TimeReading.from_dict(reading) for reading in values["time"]),
            inspection=inspection and Inspection.from_dict(inspection),
            lr=values["lr"],
            new_phase=values["new_phase"],
            origin=origin and NonFiniteOrigin.from_dict(origin),
        )
