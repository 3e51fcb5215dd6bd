"""Prolong the updates that an optimizer has just made.

Shape legend: ``N`` the tensors that were copied before the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradguard.respond.cap_enforcement import UpdateShrinker


class UpdateEnlarger(UpdateShrinker):
    """Copies chosen tensors before a step and enlarges their updates after it.

    The reverse of its base, as independent of the optimizer, and without a host read.

    Args:
        parameters: The optimizer's parameters.

    Example:
        >>> import torch
        >>> weight = torch.ones(10)
        >>> enlarger = UpdateEnlarger([weight])
        >>> enlarger.begin({0: 4.0})
        >>> weight.mul_(0.99)[0].item() < 1.0  # the step
        True
        >>> enlarger.enlarge(max_ratio=0.03)  # wanted: four times as far
        >>> round(weight[0].item(), 4)
        0.97
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, on_device=True)
        self._factors: dict[int, float] = {}
        self._factors_N = torch.zeros(0)

    @torch.no_grad()
    def begin(self, factors: Mapping[int, float]) -> None:
        """Copy the tensors that are to be enlarged; none for an empty mapping.

        Args:
            factors: By the number of the parameter.
        """
        if not factors and not self._chosen:
            return
        chosen = sorted(factors)
        self.copy(chosen)
        if factors != self._factors:  # lists become tensors by a copy that waits
            self._factors = dict(factors)
            device = self._copies[0].device if chosen else None
            self._factors_N = torch.tensor([factors[i] for i in chosen], device=device)

    @torch.no_grad()
    def enlarge(self, max_ratio: float) -> None:
        """Enlarge the updates of the copied tensors.

        Args:
            max_ratio: None is made larger than this share of its tensor's norm.
        """
        if not self._chosen:
            return
        tensors = [self._parameters[i].detach() for i in self._chosen]
        room_N = max_ratio / self._ratios(tensors)
        # A tensor that did not move has all room, and one that is not finite has none.
        extra_N = torch.minimum(self._factors_N, room_N).nan_to_num(1.0).clamp_(min=1.0).sub_(1.0)
        changes = list(torch._foreach_sub(tensors, self._copies))
        torch._foreach_mul_(changes, list(extra_N.unbind()))
        torch._foreach_add_(tensors, changes)
