"""Move tensors back along the update that an optimizer has just made.

Shape legend: ``N`` the tensors that were copied before the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.measure.norms import norm_each
from lightning_gradguard.measure.sharding import ShardReducer, local_tensor
from lightning_gradguard.measure.updates import RMS_FLOOR


def real_numel(tensor: Tensor) -> int:
    """How many real numbers the tensor is made of."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def local_norms(tensors: Sequence[Tensor]) -> Tensor:
    """(N,) float32 L2 norm of each tensor, of any dtype; a complex element is a pair of numbers."""
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    # torch refuses to sum the squares of doubles in less than double.
    wide = any(t.dtype is torch.float64 for t in real)
    return norm_each(real, torch.float64 if wide else torch.float32).to(torch.float32)


class UpdateShrinker:
    """Copies chosen tensors before a step and shrinks their updates after it.

    Works for any optimizer, as it looks at what the step did and not at how.

    Args:
        parameters: The optimizer's parameters.
        on_device: Decide on the device, with no host read.
        allowances: What each tensor's share is multiplied by, see
            :func:`~lightning_gradguard.respond.update_bounds.make_bound`; none for 1.

    Example:
        >>> import torch
        >>> weight = torch.ones(10)
        >>> shrinker = UpdateShrinker([weight], on_device=False)
        >>> shrinker.copy([0])
        >>> weight.mul_(0.5)[0].item()  # the step
        0.5
        >>> shrinker.shrink(max_ratio=0.03)
        1
        >>> round(weight[0].item(), 4)
        0.97
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        on_device: bool,
        allowances: Sequence[float] = (),
    ) -> None:
        self._parameters = list(parameters)
        self._on_device = on_device
        self._allowances = list(allowances)
        self._chosen: list[int] = []
        self._copies: list[Tensor] = []
        self._floors_N = torch.zeros(0)
        self._allowed_N: Tensor | None = None
        self._ratios_N = torch.zeros(0)
        self._numbers_N = torch.zeros(0, dtype=torch.long)
        self._given: list[float] = []
        self._given_N = torch.zeros(0)
        self._reducer = ShardReducer([])

    @torch.no_grad()
    def copy(self, chosen: list[int]) -> None:
        """Copy the tensors with these numbers, in ascending order; none for an empty list."""
        tensors = [local_tensor(self._parameters[i]).detach() for i in chosen]
        if chosen != self._chosen:
            self._chosen = chosen
            self._copies = [torch.empty_like(t) for t in tensors]
            self._reducer = ShardReducer([self._parameters[i] for i in chosen])
            floors = [real_numel(t) * RMS_FLOOR**2 for t in tensors]
            device = tensors[0].device if tensors else None
            self._floors_N = torch.tensor(floors, device=device)
            if self._allowances:
                allowed = [self._allowances[i] ** 2 for i in chosen]
                self._allowed_N = torch.tensor(allowed, device=device)
            self._numbers_N = torch.tensor(chosen, dtype=torch.long, device=device)
        if tensors:
            torch._foreach_copy_(self._copies, tensors)

    @torch.no_grad()
    def shrink(self, max_ratio: float, scales: Sequence[float] | None = None) -> int | Tensor:
        """Scale the updates of the copied tensors down.

        Args:
            max_ratio: No update is left larger than this share of its tensor's norm.
            scales: (N,) factors of at most 1 that each update is scaled by in any case.

        Returns:
            How many were scaled: an ``int``, or a () tensor when deciding on the device.
        """
        if not self._chosen:
            return 0
        tensors = [local_tensor(self._parameters[i]).detach() for i in self._chosen]
        self._ratios_N = self._ratios(tensors)
        excess_N = (self._ratios_N / max_ratio).clamp_(min=1.0)
        if scales is not None:
            if list(scales) != self._given:  # lists become tensors by a copy that waits
                self._given = list(scales)
                self._given_N = torch.tensor([1.0 / s for s in scales], device=excess_N.device)
            excess_N = torch.maximum(excess_N, self._given_N)
        if self._on_device:
            # lerp with weight 1 returns its end exactly: a tensor within the cap keeps its bits
            torch._foreach_lerp_(self._copies, tensors, list(excess_N.reciprocal().unbind()))
            torch._foreach_copy_(tensors, self._copies)
            return (excess_N > 1.0).sum()
        over = 0
        for tensor, copy, excess in zip(tensors, self._copies, excess_N.tolist(), strict=True):
            if excess != 1.0:
                # an update that is not finite has no direction to keep
                tensor.copy_(copy.lerp_(tensor, 1.0 / excess) if math.isfinite(excess) else copy)
                over += 1
        return over

    def beyond(self, ratio: float) -> int | Tensor:
        """How many of the copied tensors the last step moved by more than ``ratio``."""
        if not self._chosen:
            return 0
        count = (self._ratios_N > ratio).sum()
        return count if self._on_device else int(count)

    def unshrunk(self, ratios_P: Tensor) -> Tensor:
        """(P,) measured ratios, of the copied tensors as the last step was before it was shrunk."""
        if not self._chosen:
            return ratios_P
        return ratios_P.index_copy(0, self._numbers_N, self._ratios_N.to(ratios_P))

    def _ratios(self, tensors: list[Tensor]) -> Tensor:
        """(N,) ‖ΔW‖ / max(‖W‖, floor) of the step just taken, as a multiple of the allowance."""
        changes = list(torch._foreach_sub(tensors, self._copies))
        squares_3N = torch.stack(
            [
                local_norms(changes).square_(),
                local_norms(self._copies).square_(),
                self._floors_N,
            ]
        )
        squares_3N = self._reducer.sum(squares_3N)
        least = torch.finfo(squares_3N.dtype).tiny  # for a tensor without elements
        size_N = torch.maximum(squares_3N[1], squares_3N[2]).clamp_(min=least)
        if self._allowed_N is not None:
            size_N = size_N * self._allowed_N
        return squares_3N[0].div_(size_N).sqrt_()
