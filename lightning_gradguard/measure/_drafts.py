"""Readings of which the numbers are still on the device, and the host's reading of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_gradguard.measure.decay import Decay, bin_profile
from lightning_gradguard.readings import MAX_BINS, TimeReading

SEVERAL_ENTRIES = (
    "the loss enters at several timesteps, so the input's gradient does not show the rate: "
    "the exact measurement does"
)
NOT_FINITE = "the gradient is not finite"
NO_GRADIENT = "no gradient arrived"
TOO_FEW_STEPS = "no two neighboring timesteps have a gradient that can be compared"


@dataclass(frozen=True, eq=False)
class Draft:
    """A reading in the making.

    Attributes:
        reading: What the host knows of it.
        numbers: Values on the device by the name of their field: scalars, or vectors for
            ``profile`` and ``entry``.
        causes: Scalars on the device.
        doubts: What makes the rate wrong or unknown: a sentence for the note, and whether it is so.
            Where several hold, the first one is said.
    """

    reading: TimeReading
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    causes: Mapping[str, Tensor] = field(default_factory=dict)
    doubts: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All values, in the order in which :meth:`decode` takes them."""
        return [*self.numbers.values(), *self.causes.values(), *self.doubts.values()]

    def decode(self, values: Sequence[float]) -> TimeReading:
        """The reading, from as many values as :meth:`tensors` has elements."""
        rest = iter(values)
        fields: dict[str, Any] = {}
        for name, tensor in self.numbers.items():
            taken = tuple(next(rest) for _ in range(tensor.numel()))
            fields[name] = taken if tensor.dim() else taken[0]
        fields["causes"] = {name: next(rest) for name in self.causes}
        doubts = [sentence for sentence in self.doubts if next(rest)]
        fields["steps"] = int(fields.get("steps", 0))
        reading = replace(self.reading, **fields)
        if doubts:
            note = reading.note or doubts[0]
            reading = replace(
                reading, decay_rate=math.nan, decay_error=math.nan, steps=0, note=note
            )
        if math.isnan(reading.decay_rate) and not reading.note:
            reading = replace(reading, note=TOO_FEW_STEPS)
        return reading


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a probe has seen, still on the device.

    Attributes:
        values: (N,) all numbers, for one copy to the host; :meth:`decode` makes readings of them.
    """

    values: Tensor
    _drafts: tuple[Draft, ...] = field(repr=False)

    @classmethod
    def of(cls, drafts: Sequence[Draft]) -> Snapshot:
        """Put the numbers of several drafts into one vector."""
        tensors = [tensor for draft in drafts for tensor in draft.tensors()]
        device = tensors[0].device if tensors else torch.device("cpu")
        dtype = widest(device)
        values = [tensor.reshape(-1).to(device, dtype) for tensor in tensors]
        joined = torch.cat(values) if values else torch.zeros(0, dtype=dtype)
        return cls(joined, tuple(drafts))

    def decode(self, values: Sequence[float]) -> list[TimeReading]:
        """Readings from the numbers of :attr:`values`, now on the host.

        Raises:
            ValueError: If these are not as many numbers.
        """
        if len(values) != self.values.numel():
            raise ValueError(
                f"values must be the {self.values.numel()} numbers of this snapshot, "
                f"got {len(values)}"
            )
        readings, at = [], 0
        for draft in self._drafts:
            size = sum(tensor.numel() for tensor in draft.tensors())
            readings.append(draft.decode(values[at : at + size]))
            at += size
        return readings


def decay_numbers(decay: Decay, stride: int = 1) -> dict[str, Tensor]:
    """The fields of a reading that come from a fit.

    Args:
        decay: Per step.
        stride: Timesteps in a step.
    """
    return {
        "decay_rate": decay.rate / stride,
        "decay_error": decay.error / stride,
        "steps": decay.steps,
    }


def widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype of ``device``."""
    return torch.float32 if device.type == "mps" else torch.float64


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """(T, B) of all sequences of several calls, the shorter ones filled with 0."""
    longest = max(len(part) for part in parts)
    return torch.cat([pad(part, (0, 0, 0, longest - len(part))) for part in parts], dim=1)


def reached(norms_TB: Tensor) -> Tensor:
    """(T, B) whether a sequence goes on at a timestep: it ends where no gradient enters any more.

    The end of a padded sequence is known to the user's loss only.
    """
    return (norms_TB != 0).flip(0).cumsum(0).flip(0) > 0


def entry_shares(entry_TB: Tensor) -> Tensor:
    """Share of the squared gradient that enters in each bin of timesteps."""
    norm_T = torch.linalg.vector_norm(entry_TB, dim=1, keepdim=True)
    share_T = (norm_T / torch.linalg.vector_norm(norm_T)).nan_to_num(0.0)
    bins = bin_profile(share_T, torch.ones_like(share_T, dtype=torch.bool)).square()
    timesteps = len(entry_TB)
    if timesteps > MAX_BINS:  # of each bin bin_profile gives the mean
        edges = torch.arange(MAX_BINS + 1, device=bins.device) * timesteps
        edges = (edges + MAX_BINS - 1).div(MAX_BINS, rounding_mode="floor")
        bins = bins * edges.diff()
    return bins


def doubts(norms_TB: Tensor) -> dict[str, Tensor]:
    """What makes a rate from these norms unknown."""
    return {NOT_FINITE: ~norms_TB.isfinite().all(), NO_GRADIENT: (norms_TB == 0).all()}
