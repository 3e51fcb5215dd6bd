"""Outputs of the units of an activation, counted.

Shape suffix: ``U`` units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.measure._activation_kinds import ActivationKind, Flat
from lightning_gradguard.measure._drafts import widest

# Of a large call only some of the outputs are counted: a unit that wakes for none of thousands of
# outputs, over all looks, is dead for all that its gradient is worth.
_MOST_COUNTED = 2**18
_LEAST_EXAMPLES = 256
_NEARLY_ALL = 0.95


@dataclass(eq=False)
class Counts:
    """Outputs of the units of one activation, counted.

    Attributes:
        examples: Outputs per unit.
        inactive_U: How many of them were inactive; ``None`` for kinds that never are.
        saturated_U: Likewise.
    """

    examples: int = 0
    inactive_U: Tensor | None = None
    saturated_U: Tensor | None = None

    def add(self, other: Counts) -> Counts:
        """Both together, where the first was counted."""
        return Counts(
            self.examples + other.examples,
            _sum(self.inactive_U, other.inactive_U),
            _sum(self.saturated_U, other.saturated_U),
        )

    def to_list(self) -> list[Any]:
        """As plain values."""
        counts = (self.inactive_U, self.saturated_U)
        return [self.examples, *(None if c is None else c.tolist() for c in counts)]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Counts:
        """The inverse of :meth:`to_list`."""
        examples, *counts = values
        return cls(
            examples, *(None if c is None else torch.tensor(c, dtype=torch.int32) for c in counts)
        )


def count(kind: ActivationKind, module: nn.Module, value: Tensor, axis: int) -> Counts:
    """Count the outputs of one call.

    Args:
        kind: What the module is.
        module: The module.
        value: Its output, or input for kinds that are decided by it.
        axis: Dimension of the units.
    """
    units = value.shape[axis]
    others = [dim for dim in range(value.dim()) if dim != axis]
    stride = value.numel() // units // max(_LEAST_EXAMPLES, _MOST_COUNTED // units)
    if stride > 1:
        longest = max(others, key=lambda dim: value.shape[dim])
        value = value.movedim(longest, 0)[::stride].movedim(0, longest)

    def counted(where: Flat | None) -> Tensor | None:
        if where is None:
            return None
        flat = where(module, value)
        return flat.sum(others, dtype=torch.int32) if others else flat.int()

    return Counts(value.numel() // units, counted(kind.inactive), counted(kind.saturated))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return None
    if other.device != one.device:
        other = other.to(one.device, non_blocking=True)
    return one + other


def units_of(counts: Counts) -> int:
    """How many units they are of."""
    known = counts.inactive_U if counts.inactive_U is not None else counts.saturated_U
    return 0 if known is None else len(known)


def shares_of(counts: Counts) -> Tensor:
    """(3,) dead, inactive, saturated."""
    known = counts.inactive_U if counts.inactive_U is not None else counts.saturated_U
    device = torch.device("cpu") if known is None else known.device
    unknown = torch.full((), math.nan, dtype=widest(device), device=device)
    dead = inactive = saturated = unknown
    if counts.inactive_U is not None:
        dead = (counts.inactive_U == counts.examples).to(unknown.dtype).mean()
        inactive = counts.inactive_U.to(unknown.dtype).mean() / counts.examples
    if counts.saturated_U is not None:
        enough = counts.saturated_U >= _NEARLY_ALL * counts.examples
        saturated = enough.to(unknown.dtype).mean()
    return torch.stack([dead, inactive, saturated])
