"""Norms of the weights, which every bound on relative updates is a share of.

Shape legend: ``P`` parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.measure.sharding import ShardReducer, local_tensor
from lightning_gradguard.measure.updates import RMS_FLOOR
from lightning_gradguard.respond.cap_enforcement import local_norms

# Weight norms change by at most the cap in a step, so they are measured this rarely.
REFRESH_EVERY = 16
# A tensor is copied when its expected ratio reaches this share of the cap.
NEAR_SHARE = 0.5


class WeightNorms:
    """Measures max(‖W‖, floor·√numel) of every tensor now and then, on the device.

    Args:
        parameters: The tensors.
        allowances: What each norm is multiplied by, see :func:`make_bound`; none for 1.
        floor: Default: the least root mean square that relative updates are shares of.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        allowances: Sequence[float] = (),
        floor: float = RMS_FLOOR,
    ) -> None:
        self._parameters = list(parameters)
        self._allowances = list(allowances)
        self._allowances_P: Tensor | None = None
        self._floor = floor
        self._reducer = ShardReducer(self._parameters)
        self._age = 0
        self.norms_P: Tensor | None = None
        self._floors_P: Tensor | None = None

    @torch.no_grad()
    def refresh(self) -> bool:
        """Measure if it is time to; returns whether it was."""
        due = self.norms_P is None or self._age % REFRESH_EVERY == 0
        self._age += 1
        if due:
            tensors = [local_tensor(p).detach() for p in self._parameters]
            tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
            norms_P = local_norms(tensors)
            if self._floors_P is None:  # once: lists become tensors by a copy that waits
                self._floors_P = norms_P.new_tensor([t.numel() * self._floor**2 for t in tensors])
                if self._allowances:
                    self._allowances_P = norms_P.new_tensor(self._allowances)
            squares_2P = self._reducer.sum(torch.stack([norms_P.square(), self._floors_P]))
            least = torch.finfo(squares_2P.dtype).tiny  # for a tensor without elements
            self.norms_P = torch.maximum(squares_2P[0], squares_2P[1]).clamp_(min=least).sqrt_()
            if self._allowances_P is not None:
                self.norms_P.mul_(self._allowances_P)
        return due

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""
        norms = None if self.norms_P is None else self.norms_P.tolist()
        return {"age": self._age, "norms": norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; other parameters than then are measured afresh."""
        self._age = int(state["age"])
        norms = state["norms"]
        if norms is not None and len(norms) == len(self._parameters):
            self.norms_P = torch.tensor(norms, device=local_tensor(self._parameters[0]).device)


def group_numbers(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[int]:
    """The number of the parameter group of each tensor."""
    numbers = {
        id(p): number
        for number, group in reversed(list(enumerate(optimizer.param_groups)))
        for p in group["params"]
    }
    return [numbers[id(p)] for p in parameters]


def group_sizes(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[int]:
    """How many of the tensors, which are in the order of their groups, are in each group."""
    numbers = group_numbers(optimizer, parameters)
    return [numbers.count(number) for number in range(len(optimizer.param_groups))]
