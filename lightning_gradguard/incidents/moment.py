"""A batch on its way through training, with all that its forward pass depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gradguard.dry_run.finite import is_finite, tensors_of
from lightning_gradguard.incidents.randomness import RandomState


@dataclass(eq=False)
class Moment:
    """The batch of a step; nothing is copied.

    Attributes:
        batch: As ``training_step`` takes it.
        batch_idx: Its number.
        random: The random numbers that came next before its forward pass.
        steps: Number of the coming step of each optimizer at that time.
        loss: Its loss on this process, once it is known.
    """

    batch: Any
    batch_idx: int
    random: RandomState
    steps: tuple[int, ...] = ()
    loss: Tensor | None = None

    def is_finite(self) -> bool:
        """Whether its loss, as far as it is known, and all of the batch are finite numbers."""
        if self.loss is not None and not is_finite(self.loss):
            return False
        return all(is_finite(value) for _, value in tensors_of(self.batch))
