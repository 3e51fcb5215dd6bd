"""Clip each unit, a row of a weight or a whole vector, to a share of its own norm.

Shape legend: ``P`` parameters, ``U`` units of all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.measure import GradNorms
from lightning_gradguard.respond.clip_coefficients import device_overall, overall, widest
from lightning_gradguard.respond.clip_thresholds import ClipBounds
from lightning_gradguard.respond.clipping import AGC


class UnitClipper:
    """Clips units; whether there is need to is read along with the gradient norm.

    Args:
        settings: The share, and the least norm.
        parameters: The optimizer's parameters, each once.
        left_alone: Numbers of those that are not clipped.

    Attributes:
        size: Length of the signal.
        factors: What the gradients' norms were multiplied by: 1.0, or (P,) one for each.
    """

    size = 2

    def __init__(
        self, settings: AGC, parameters: Sequence[Tensor], left_alone: Collection[int] = ()
    ) -> None:
        self.factors: float | Tensor = 1.0
        self._settings = settings
        self._parameters = list(parameters)
        self._numbers = [i for i in range(len(self._parameters)) if i not in left_alone]
        self._present: list[int] = []
        self._owners_U: Tensor | None = None
        self._sizes: list[int] = []
        self._coefficients_U: Tensor | None = None
        self._factors_P: Tensor | None = None
        self._signal_2: Tensor | None = None

    @torch.no_grad()
    def signal(self, norms: GradNorms, scale: float = 1.0) -> Tensor:
        """(2,) how many units are over, and the total norm that clipping them leaves.

        Args:
            norms: Of the gradients.
            scale: By which the gradients, but not their norms, are too large.
        """
        self.factors = 1.0
        values_P, device = norms.values, norms.values.device
        present = [i for i in self._numbers if _is_dense(self._parameters[i].grad)]
        if not present:
            self._coefficients_U = None
            self._signal_2 = torch.stack([torch.zeros_like(norms.total), norms.total])
            return self._signal_2
        units = [_unit_norms(self._parameters[i].grad) for i in present]
        norms_U = torch.cat([norm.to(device) for norm in units]) / scale
        weights = [_unit_norms(self._parameters[i].detach()) for i in present]
        limits_U = torch.cat([norm.to(device) for norm in weights])
        limits_U = limits_U.clamp_(min=self._settings.eps).mul_(self._settings.clip_factor)
        over_U = (norms_U > limits_U) & norms_U.isfinite()
        self._coefficients_U = torch.where(over_U, limits_U / norms_U, 1.0)
        owners_U = self._owners(present, units, device)
        left_U = torch.minimum(norms_U, limits_U).to(widest(device))
        over_P = values_P.new_zeros(len(values_P)).index_add_(0, owners_U, over_U.to(values_P))
        squares_P = left_U.new_zeros(len(values_P)).index_add_(0, owners_U, left_U.square())
        # Nothing is over: the norm that was measured, bit for bit
        clipped_P = (over_P > 0.0) & values_P.isfinite()
        after_P = torch.where(clipped_P, squares_P.sqrt_().to(values_P), values_P)
        self._factors_P = torch.where(clipped_P, after_P / values_P, 1.0)
        self._signal_2 = torch.stack([over_P.sum(), torch.linalg.vector_norm(after_P)])
        return self._signal_2

    def _owners(self, present: list[int], units: list[Tensor], device: torch.device) -> Tensor:
        """(U,) the number of the parameter that each unit belongs to."""
        if present != self._present or self._owners_U is None:
            self._present, self._sizes = present, [len(norms) for norms in units]
            repeated = torch.repeat_interleave(torch.tensor(present), torch.tensor(self._sizes))
            self._owners_U = repeated.to(device)
        return self._owners_U

    def segment_norms(self, seen: Sequence[float]) -> tuple[float, ...]:
        """None: no threshold is learned."""
        return ()

    @torch.no_grad()
    def on_host(self, bounds: ClipBounds | None, total_norm: float, seen: Sequence[float]) -> float:
        """Multiply if any unit is over; returns the total norm after divided by before.

        Args:
            bounds: Of no use here.
            total_norm: Before clipping.
            seen: The signal of this step.
        """
        over, after = seen
        if over == 0.0 or self._factors_P is None:
            return 1.0
        self._multiply()
        self.factors = self._factors_P
        return overall(after, total_norm)

    @torch.no_grad()
    def on_device(self, bounds: ClipBounds | None, total_norm: Tensor, seen: Tensor) -> Tensor:
        """The same without a host read: every unit is multiplied, mostly by 1; returns a ()."""
        if self._coefficients_U is None or self._factors_P is None:
            return torch.ones_like(total_norm)
        self._multiply()
        self.factors = self._factors_P
        return device_overall(seen[1], total_norm, seen[0] > 0.0)

    def _multiply(self) -> None:
        if self._coefficients_U is None:
            return
        gradients, factors = [], []
        parts = self._coefficients_U.split(self._sizes)
        for number, part in zip(self._present, parts, strict=True):
            gradient = self._parameters[number].grad
            if gradient is None:  # dropped
                continue
            shape = (-1, *[1] * (gradient.dim() - 1)) if gradient.dim() else ()
            factor = part.to(gradient.device).view(shape)
            if gradient.is_complex():
                gradient, factor = torch.view_as_real(gradient), factor.unsqueeze(-1)
            gradients.append(gradient)
            factors.append(factor)
        if gradients:
            torch._foreach_mul_(gradients, factors)
        self._coefficients_U = None

    def renew(self) -> None:
        """Weights are other ones than before."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are measured on every step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to continue."""


def _is_dense(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout is torch.strided


def _unit_norms(tensor: Tensor | None) -> Tensor:
    """Norm of each row, or of all of a vector, in at least float32."""
    if tensor is None:
        raise ValueError("tensor must be a tensor, got None")
    dims = tuple(range(1, tensor.dim()))
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
        dims = (*dims, tensor.dim() - 1) if dims else dims
    wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims or None, dtype=wide)
    return norms if dims else norms.view(1)
