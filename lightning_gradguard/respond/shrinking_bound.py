"""What all bounds on updates are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.respond.cap_enforcement import UpdateShrinker


class ShrinkingBound:
    """Knows the optimizer and its parameters, and can shrink their updates after a step.

    Args:
        optimizer: The optimizer.
        parameters: Its parameters, each once.
        on_device: Decide on the device, with no host read.
        large_ratio: What counts as a large relative update, whether or not it is held back.
        allowances: What each tensor's share is multiplied by, see
            :func:`~lightning_gradguard.respond.update_bounds.make_bound`; none for 1.

    Attributes:
        large: How many tensors would have moved by more than ``large_ratio`` in the last step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        *,
        on_device: bool,
        large_ratio: float = math.inf,
        allowances: Sequence[float] = (),
    ) -> None:
        self.large: int | Tensor = 0
        self._large_ratio = large_ratio
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._on_device = on_device
        self._allowances = list(allowances)
        self._shrinker = UpdateShrinker(parameters, on_device=on_device, allowances=allowances)
        self._max_ratio = math.inf
        self._steps = 0
