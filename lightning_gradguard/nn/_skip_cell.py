"""The equations of Skip RNNs, one timestep at a time.

Shape suffixes: ``T`` time, ``B`` batch, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from lightning_gradguard.nn._scan import Cell, States


def round_half_up(value: Tensor) -> Tensor:
    """0 or 1, for values in [0, 1]; its gradient is that of ``value`` (straight-through).

    ``torch.round`` rounds half to even: there 0.5 is 0.

    Example:
        >>> round_half_up(torch.tensor([0.0, 0.49, 0.5, 1.0]))
        tensor([0., 0., 1., 1.])
    """
    known = value.detach()
    # Exact in [0, 1]: 1 minus a number above a half has no rounding error.
    return value + torch.add(known >= 0.5, known, alpha=-1)


def next_probability(used: Tensor, probability: Tensor, increment: Tensor) -> Tensor:
    """``u Δũ + (1 − u)(ũ + min(Δũ, 1 − ũ))``: the increment after an update, the sum after a copy.

    Args:
        used: u_t.
        probability: ũ_t.
        increment: Δũ_t.
    """
    return torch.lerp((probability + increment).clamp(max=1.0), increment, used)


@dataclass(frozen=True, eq=False)
class SkipCell(Cell):
    """One or more layers that are updated, or copied, together.

    The states are those of the layers, from the top layer down, so that the first is the output,
    and last ũ, ``(B, 1)``: for two LSTM layers (h₁, c₁, h₀, c₀, ũ). A trace has them as one part,
    and only together do they carry the whole gradient through time: from layer to layer it goes
    through the candidates, within a timestep, and not through h₀.

    Attributes:
        layers: Equations of the layers, from the bottom up.
        weight: W_p, ``(1, H)``.
        bias: b_p, ``(1,)``.
        dropout: Of what goes from a layer to the next one.
        used: u_t of the timesteps so far, each ``(B, 1)``.
    """

    layers: tuple[Cell, ...]
    weight: Tensor
    bias: Tensor
    dropout: float = 0.0
    used: list[Tensor] = field(default_factory=list)

    def project(self, x: Tensor) -> States:
        """See :class:`Cell`."""
        return self.layers[0].project(x)

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        used = round_half_up(states[-1])
        self.used.append(used)
        made: States = ()
        top: States = ()
        for depth, (cell, old) in enumerate(zip(self.layers, self.by_layer(states), strict=True)):
            if depth > 0:
                projected = cell.project(dropout(top[0], self.dropout, self.dropout > 0))
            top = cell.step(number, projected, old)
            made = (*(_updated(used, *pair) for pair in zip(old, top, strict=True)), *made)
        read = made[len(top) - 1]  # of the top layer: c, or h where there is no other
        increment = torch.sigmoid(linear(read, self.weight, self.bias).to(used.dtype))
        return (*made, next_probability(used, states[-1], increment))

    def by_layer(self, states: States) -> Iterator[States]:
        """The states of each layer, from the bottom up, without ũ."""
        size = (len(states) - 1) // len(self.layers)
        for end in range(len(states) - 1, 0, -size):
            yield states[end - size : end]

    def gates(self, batch_sizes: Sequence[int] | None, *, reverse: bool) -> Tensor:
        """All u_t in real time, ``(T, B)``, or ``(N,)`` if packed."""
        used = self.used[::-1] if reverse else self.used
        return (torch.stack(used) if batch_sizes is None else torch.cat(used)).squeeze(-1)


def _updated(used: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """``u S + (1 − u) s``; under autocast the two may differ in dtype."""
    return torch.lerp(old.to(new.dtype), new, used.to(new.dtype))
