"""Recurrent dropout and zoneout: noise inside a recurrence, drawn for all timesteps at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradguard._validation import check_number
from lightning_gradguard.nn._scan import States

Zoneout = float | tuple[float, float]


@dataclass(frozen=True)
class RecurrentNoise:
    """Recurrent dropout of the candidate and zoneout of each state.

    Attributes:
        dropout: Probability that a unit of the candidate is dropped at a timestep.
        zoneout: For each state, the probability that a unit keeps what it was at a timestep.
        training: Whether to draw at all; if not, zoneout takes its expectation.

    Raises:
        TypeError: If a probability is not a number.
        ValueError: If one is below 0 or not below 1.
    """

    dropout: float
    zoneout: tuple[float, ...]
    training: bool = False

    def __post_init__(self) -> None:
        check_number("recurrent_dropout", self.dropout, at_least=0, below=1)
        for probability in self.zoneout:
            check_number("zoneout", probability, at_least=0, below=1)

    def draw(self, x: Tensor, hidden_size: int) -> States:
        """Masks for all timesteps of ``x``; none where there is nothing to draw."""
        if not self.training:
            return ()
        shape = (*x.shape[:-1], hidden_size)
        masks = []
        if self.dropout:
            kept = 1.0 - self.dropout
            masks.append(x.new_empty(shape).bernoulli_(kept).div_(kept))
        masks += [torch.rand(shape, device=x.device) < p for p in self.zoneout if p]
        return tuple(masks)

    def read(self, masks: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """What was drawn for a timestep: for the candidate, then for each state."""
        if not masks:
            return (None,) * (1 + len(self.zoneout))
        drawn = iter(masks)
        return tuple(next(drawn) if p else None for p in (self.dropout, *self.zoneout))


def zone_out(new: Tensor, old: Tensor, probability: float, mask: Tensor | None) -> Tensor:
    """A state of which some units keep what they were, or in expectation without a mask."""
    if not probability:
        return new
    if mask is not None:
        return torch.where(mask, old, new)
    return torch.lerp(new, old.to(new.dtype), probability)


def zoneout_pair(zoneout: Zoneout) -> tuple[float, float]:
    """Zoneout of h and of c.

    Raises:
        ValueError: If there are not two.
    """
    if not isinstance(zoneout, (tuple, list)):
        return zoneout, zoneout
    if len(zoneout) != 2:
        raise ValueError(
            f"zoneout must be a number or a pair of them, for h and for c, got {zoneout!r}"
        )
    return zoneout[0], zoneout[1]
