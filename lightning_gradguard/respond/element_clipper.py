"""Clamp every element of the gradients.

Shape legend: ``P`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.measure import GradNorms, NormMeter
from lightning_gradguard.measure.sharding import ShardReducer, local_tensor
from lightning_gradguard.respond.clip_coefficients import device_overall, widest
from lightning_gradguard.respond.clip_thresholds import ClipBounds
from lightning_gradguard.respond.clipping import ValueClip


class ElementClipper:
    """Clamps each element where any is too large.

    What that leaves of the norms has to be measured anew, which takes one more pass and, on the
    host, one more read; on the host only on steps on which something was clamped. Of sharded
    tensors it is computed beforehand, so that no rank waits for one that has failed meanwhile. An
    infinity becomes the largest allowed value, unless another rung drops the step; a NaN stays.

    Args:
        settings: The largest absolute value.
        meter: Measures the gradients.
        on_device: Clamp without asking the host whether there is need to.

    Attributes:
        size: Length of the signal.
        factors: What the gradients' norms were multiplied by: 1.0, or (P,) one for each.
    """

    def __init__(self, settings: ValueClip, meter: NormMeter, *, on_device: bool) -> None:
        self._max_value = settings.max_value
        self._meter = meter
        self._sharded = any(local_tensor(p) is not p for p in meter.parameters)
        self._reducer = ShardReducer(meter.parameters)
        self._looks = self._sharded or not on_device
        self.size = int(self._looks)
        self.factors: float | Tensor = 1.0
        self._scale = 1.0
        self._before: GradNorms | None = None
        self._left_P: Tensor | None = None

    @torch.no_grad()
    def signal(self, norms: GradNorms, scale: float = 1.0) -> Tensor | None:
        """(1,) whether any element is too large, 0 if none is; nothing where all are clamped.

        Args:
            norms: Of the gradients.
            scale: By which the gradients, but not their norms, are too large.
        """
        self._before, self._scale, self.factors = norms, scale, 1.0
        if not self._looks:
            return None
        elements, like = self._elements(), norms.values
        over_P = like.new_zeros(len(like))
        if elements:
            peaks = torch._foreach_norm(list(elements.values()), math.inf)
            wide = widest(like.device)
            peaks_N = torch.stack([peak.to(like.device, wide) for peak in peaks])
            over_N = ~(peaks_N <= self._max_value * scale)
            if not self._sharded:
                return over_N.any().to(like).view(1)
            for number, over in zip(elements, over_N.to(like).unbind(), strict=True):
                over_P[number] = over
        if self._sharded:
            over_P = self._look_ahead(elements, over_P, norms)
        return (over_P > 0.0).any().to(like).view(1)

    def _look_ahead(self, elements: dict[int, Tensor], over_P: Tensor, norms: GradNorms) -> Tensor:
        """Compute what clamping will leave of each norm; returns which tensors are over anywhere.

        One tensor after the other, so that only one at a time is held twice.
        """
        limit = self._max_value * self._scale
        squares_P = torch.zeros_like(over_P, dtype=widest(over_P.device))
        for number, element in elements.items():
            left = torch.linalg.vector_norm(element.clamp(-limit, limit))
            squares_P[number] = (left / self._scale).to(squares_P).square()
        over_P, squares_P = self._reducer.sum(torch.stack([over_P.to(squares_P), squares_P]))
        self._left_P = torch.where(over_P > 0.0, squares_P.sqrt().to(norms.values), norms.values)
        return over_P

    def segment_norms(self, seen: Sequence[float]) -> tuple[float, ...]:
        """None: no threshold is learned."""
        return ()

    def _elements(self) -> dict[int, Tensor]:
        """By parameter, its gradient as dense real numbers that can be changed in place."""
        elements = {}
        for number, parameter in enumerate(self._meter.parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is torch.sparse_coo:
                if not gradient.is_coalesced():  # rows that occur twice are added first
                    parameter.grad = gradient = gradient.coalesce()
                gradient = gradient.values()
            gradient = local_tensor(gradient)
            gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            if gradient.numel():
                elements[number] = gradient
        return elements

    @torch.no_grad()
    def on_host(self, bounds: ClipBounds | None, total_norm: float, seen: Sequence[float]) -> float:
        """Clamp if there is need to; returns the total norm after divided by before.

        Args:
            bounds: Of no use here.
            total_norm: Likewise.
            seen: The signal of this step.
        """
        return 1.0 if seen and seen[0] == 0.0 else float(self._clamp())

    @torch.no_grad()
    def on_device(self, bounds: ClipBounds | None, total_norm: Tensor, seen: Tensor) -> Tensor:
        """Clamp; returns the same as a ()."""
        return self._clamp().to(total_norm.device)

    def _clamp(self) -> Tensor:
        elements, limit = list(self._elements().values()), self._max_value * self._scale
        if elements:
            torch._foreach_clamp_min_(elements, -limit)
            torch._foreach_clamp_max_(elements, limit)
        if self._before is None:
            return torch.ones(())
        before_P = self._before.values
        left_P = self._meter.measure().values / self._scale if not self._sharded else self._left_P
        if left_P is None:
            return torch.ones_like(self._before.total)
        known_P = before_P.isfinite() & (before_P > 0.0)
        self.factors = torch.where(known_P, left_P / before_P, 1.0)
        after = torch.linalg.vector_norm(left_P)
        return device_overall(after, self._before.total, (left_P != before_P).any())

    def renew(self) -> None:
        """Weights are other ones than before."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to continue."""
