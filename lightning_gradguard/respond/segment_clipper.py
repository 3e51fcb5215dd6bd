"""Clip each segment of the gradients by its own norm.

Shape legend: ``P`` parameters, ``S`` segments, ``Z`` slots: the segments, and one more where some
parameters are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.measure import GradNorms
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.respond.clip_coefficients import (
    clip_coefficient,
    device_coefficients,
    device_overall,
    overall,
    widest,
)
from lightning_gradguard.respond.clip_thresholds import ClipBounds, ClipSegments
from lightning_gradguard.respond.clipping import AGC
from lightning_gradguard.respond.weight_norms import WeightNorms


class SegmentClipper:
    """Brings the norm of each segment down to what the plan allows, or to a share of its weights'.

    Args:
        parameters: What is clipped, each once.
        segments: Which of them are clipped together.
        agc: The thresholds, where they follow from the weights and not from the plan.

    Attributes:
        size: Length of the signal.
        factors: What the gradients were multiplied by: 1.0, or (P,) one for each.
    """

    def __init__(
        self, parameters: Sequence[Tensor], segments: ClipSegments, agc: AGC | None = None
    ) -> None:
        self.factors: float | Tensor = 1.0
        self._parameters = list(parameters)
        self._segments = segments
        self._agc = agc
        self._weights = None if agc is None else WeightNorms(parameters, floor=0.0)
        self.size = segments.slots + (len(segments.names) if agc is not None else 0)
        self._slots_P: Tensor | None = None
        self._limits_S: Tensor | None = None
        self._bounds: ClipBounds | None = None
        self._bounds_2S: Tensor | None = None

    # -- measured --------------------------------------------------------------------------------

    @torch.no_grad()
    def signal(self, norms: GradNorms, scale: float = 1.0) -> Tensor:
        """(Z,) norm of each segment, before (S,) their thresholds if they follow from the weights.

        Args:
            norms: Of the gradients.
            scale: Of no use here: the norms are free of it.
        """
        self.factors = 1.0
        norms_Z = self._together(norms.values)
        if self._weights is None or self._agc is None:
            return norms_Z
        due = self._weights.refresh()
        if (due or self._limits_S is None) and self._weights.norms_P is not None:
            weights_S = self._together(self._weights.norms_P)[: len(self._segments.names)]
            self._limits_S = weights_S.clamp_(min=self._agc.eps).mul_(self._agc.clip_factor)
        limits = [] if self._limits_S is None else [self._limits_S.to(norms_Z)]
        return torch.cat([norms_Z, *limits])

    def segment_norms(self, seen: Sequence[float]) -> tuple[float, ...]:
        """From a signal that was read, the norm of each segment."""
        return tuple(seen[: len(self._segments.names)])

    def _together(self, values_P: Tensor) -> Tensor:
        squares_P = values_P.to(widest(values_P.device)).square()
        sums_Z = squares_P.new_zeros(self._segments.slots)
        return sums_Z.index_add_(0, self._index(values_P), squares_P).sqrt_().to(values_P.dtype)

    def _index(self, like: Tensor) -> Tensor:
        if self._slots_P is None:  # once: lists become tensors by a copy that waits
            numbers = self._segments.numbers
            self._slots_P = torch.tensor(numbers, dtype=torch.int64, device=like.device)
        return self._slots_P

    # -- applied ---------------------------------------------------------------------------------

    @torch.no_grad()
    def on_host(self, bounds: ClipBounds | None, total_norm: float, seen: Sequence[float]) -> float:
        """Multiply the segments that are over; returns the total norm after divided by before.

        Args:
            bounds: What the plan allows; ``None`` if the thresholds are in the signal.
            total_norm: Of no use here: the segments' norms tell it.
            seen: The signal of this step.
        """
        count, slots = len(self._segments.names), self._segments.slots
        norms, limits = seen[:slots], seen[slots:]
        centers: Sequence[float] = [-math.inf] * count
        if bounds is not None:
            limits, centers = bounds.thresholds, bounds.centers
        coefficients = [
            clip_coefficient(norm, limit, center)
            for norm, limit, center in zip(norms[:count], limits, centers, strict=True)
        ]
        if min(coefficients, default=1.0) >= 1.0:
            return 1.0
        coefficients.append(1.0)  # of parameters that are left alone
        of_each = [coefficients[number] for number in self._segments.numbers]
        pairs = [
            (local_tensor(parameter.grad), coefficient)
            for parameter, coefficient in zip(self._parameters, of_each, strict=True)
            if coefficient < 1.0 and parameter.grad is not None
        ]
        torch._foreach_mul_([g for g, _ in pairs], [c for _, c in pairs])
        device = None if self._slots_P is None else self._slots_P.device
        self.factors = torch.tensor(of_each, device=device)
        after = math.hypot(*(c * n for c, n in zip(coefficients, norms, strict=False)))
        return overall(after, math.hypot(*norms))

    @torch.no_grad()
    def on_device(self, bounds: ClipBounds | None, total_norm: Tensor, seen: Tensor) -> Tensor:
        """The same without a host read: everything is multiplied, mostly by 1; returns a ()."""
        count, slots = len(self._segments.names), self._segments.slots
        norms_Z = seen[:slots]
        if bounds is None:
            coefficients_Z = device_coefficients(norms_Z[:count], seen[slots:])
        else:
            limits_S, centers_S = self._on_device(bounds, seen)
            coefficients_Z = device_coefficients(norms_Z[:count], limits_S, centers_S)
        if slots > count:
            coefficients_Z = torch.cat([coefficients_Z, coefficients_Z.new_ones(1)])
        self.factors = factors_P = coefficients_Z[self._index(seen)]
        scale_each(self._parameters, factors_P)
        after, before = (torch.linalg.vector_norm(n) for n in (coefficients_Z * norms_Z, norms_Z))
        return device_overall(after, before, (coefficients_Z < 1.0).any())

    def _on_device(self, bounds: ClipBounds, like: Tensor) -> tuple[Tensor, Tensor | float]:
        """Thresholds and centers as tensors, sent without waiting and only where they are new."""
        if bounds != self._bounds or self._bounds_2S is None:
            pinned = like.device.type == "cuda"
            values = [bounds.thresholds, bounds.centers]
            host_2S = torch.tensor(values, dtype=like.dtype, pin_memory=pinned)
            self._bounds, self._bounds_2S = bounds, host_2S.to(like.device, non_blocking=True)
        plain = max(bounds.centers, default=-math.inf) == -math.inf
        return self._bounds_2S[0], -math.inf if plain else self._bounds_2S[1]

    # -- state -----------------------------------------------------------------------------------

    def renew(self) -> None:
        """Weights are other ones than before."""
        if self._weights is not None:
            self._weights = WeightNorms(self._parameters, floor=0.0)
            self._limits_S = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""
        return {} if self._weights is None else {"weights": self._weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        if self._weights is not None:
            self._weights.load_state_dict(state["weights"])
            self._limits_S = None


def scale_each(parameters: Sequence[Tensor], factors_P: Tensor) -> None:
    """Multiply each gradient by its factor, in one multi-tensor call for each device."""
    by_device: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
    for number, parameter in enumerate(parameters):
        if parameter.grad is not None:
            gradient = local_tensor(parameter.grad)
            gradients, numbers = by_device.setdefault(gradient.device, ([], []))
            gradients.append(gradient)
            numbers.append(number)
    for device, (gradients, numbers) in by_device.items():
        factors = factors_P.to(device, non_blocking=device.type != "cpu").unbind()
        torch._foreach_mul_(gradients, [factors[number] for number in numbers])
