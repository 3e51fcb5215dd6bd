"""Carry out a plan on the gradients: on the host, or inside a fused optimizer's own kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.respond.clip_coefficients import (
    clip_coefficient,
    device_coefficients,
    scale_gradients,
)
from lightning_gradguard.respond.clippers import GradientClipper
from lightning_gradguard.respond.ladder import StepPlan
from lightning_gradguard.respond.skipping import drop_gradients


def runs_fused(optimizer: Optimizer) -> bool:
    """Whether the step is one of torch's fused kernels, which can clip and skip by themselves."""
    return (
        bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        and type(optimizer).__module__.startswith("torch.optim")
        and all(group.get("fused") for group in optimizer.param_groups)
    )


def apply_on_host(
    plan: StepPlan,
    total_norm: float,
    parameters: Sequence[Tensor],
    clipper: GradientClipper | None = None,
    seen: Sequence[float] = (),
) -> float:
    """Clip or drop the gradients; returns the coefficient, 0.0 for a dropped step.

    Where nothing needs clipping nothing is multiplied: the host knows, so a healthy step costs no
    pass over memory.

    Args:
        plan: The bounds.
        total_norm: Before clipping.
        parameters: Their gradients are meant.
        clipper: What clips them where one factor on all of them does not do.
        seen: Its signal of this step.
    """
    if plan.skips(total_norm):
        drop_gradients(parameters)
        return 0.0
    if clipper is not None:
        return clipper.on_host(plan.clip_segments, total_norm, seen)
    coefficient = clip_coefficient(total_norm, plan.clip_threshold, plan.clip_center)
    if coefficient < 1.0:
        gradients = [p.grad for p in parameters if p.grad is not None]
        scale_gradients(gradients, coefficient)
    return coefficient


class FusedControls:
    """Clips and skips inside a fused optimizer's kernel: no host read, no pass over memory.

    Fused kernels divide the gradient by ``optimizer.grad_scale`` and do nothing at all where
    ``optimizer.found_inf`` is 1; this is how torch's own ``GradScaler`` talks to them.
    """

    _NAMES = ("grad_scale", "found_inf")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._active = False
        self._sgd = isinstance(optimizer, torch.optim.SGD)

    def apply(
        self,
        plan: StepPlan,
        total_norm: Tensor,
        clipper: GradientClipper | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Set the controls for the coming step.

        Args:
            plan: The bounds.
            total_norm: () on the device.
            clipper: What clips where one factor on all gradients does not do, before the kernel.
            seen: Its signal of this step.

        Returns:
            The coefficient, () on the device; 0 for a dropped step.
        """
        norm = total_norm.to(torch.float32)
        limit = min(plan.skip_limit, torch.finfo(torch.float32).max)
        bad = ~(norm <= limit) if plan.may_skip else torch.zeros_like(norm, dtype=torch.bool)
        if plan.clip_center > -math.inf:
            scale = device_coefficients(norm, plan.clip_threshold, plan.clip_center).reciprocal_()
        elif math.isfinite(plan.clip_threshold):
            scale = (norm / plan.clip_threshold).clamp_(min=1.0)
            if not plan.may_skip:  # see clip_coefficient
                scale.nan_to_num_(nan=1.0, posinf=1.0)
        else:
            scale = torch.ones_like(norm)
        found_inf = bad.to(torch.float32)
        if plan.may_skip and self._sgd:
            self._drop_before_momentum(bad)
        for name, value in zip(self._NAMES, (scale, found_inf), strict=True):
            setattr(self._optimizer, name, value)
        self._active = True
        coefficient = scale.reciprocal()
        if clipper is not None:
            signal = norm.new_zeros(0) if seen is None else seen
            coefficient = clipper.on_device(plan.clip_segments, norm, signal).to(norm)
        return coefficient.masked_fill_(bad, 0.0)

    def _drop_before_momentum(self, bad: Tensor) -> None:
        """Drop on the host where SGD has no momentum yet: at a start, and in a group that is new.

        torch allocates the buffers before the kernel runs and leaves them uninitialized if the
        kernel then does nothing; the next step would start from whatever was in that memory.
        """
        groups = self._optimizer.param_groups
        if any(map(self._lacks_momentum, groups)) and bad.item():
            for group in groups:
                drop_gradients(group["params"])

    def _lacks_momentum(self, group: Mapping[str, Any]) -> bool:
        """Whether this step makes the buffers: torch makes all of one step's, or none."""
        if group["momentum"] == 0:
            return False
        first = next((p for p in group["params"] if p.grad is not None), None)
        state = {} if first is None else self._optimizer.state.get(first, {})
        return first is not None and state.get("momentum_buffer") is None

    def restore(self) -> None:
        """Take the controls off again."""
        if self._active:
            for name in self._NAMES:
                delattr(self._optimizer, name)
            self._active = False
