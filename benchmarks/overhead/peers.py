"""Peers without a package that fits here, written from their published rules."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import grad_norm
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override


class GradNormLogger(Callback):
    """What Lightning's documentation shows: ``grad_norm`` and ``log_dict`` on every step."""

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class AutoClip(Callback):
    """Clips to a percentile of all gradient norms so far (Seetharaman et al. 2020).

    The norm is read tensor by tensor, as in the reference implementation.
    """

    def __init__(self, percentile: float = 10.0) -> None:
        self.percentile = percentile
        self.history: list[float] = []

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        squares = [p.grad.norm().item() ** 2 for p in pl_module.parameters() if p.grad is not None]
        self.history.append(sum(squares) ** 0.5)
        threshold = torch.tensor(self.history).quantile(self.percentile / 100).item()
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), threshold)


class AdaptiveGradientClipping(Callback):
    """Clips every unit's gradient to a share of the unit's own norm (AGC, Brock et al. 2021).

    A unit is a row of a weight, or a whole vector. The head, where a model has one, is left alone.
    """

    def __init__(self, ratio: float = 0.01, least_norm: float = 1e-3) -> None:
        self.ratio = ratio
        self.least_norm = least_norm

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is None or "head" in name:
                continue
            limit = _unit_norms(parameter).clamp_(min=self.least_norm).mul_(self.ratio)
            norms = _unit_norms(parameter.grad)
            clipped = parameter.grad * (limit / norms.clamp(min=1e-6))
            parameter.grad.copy_(torch.where(norms < limit, parameter.grad, clipped))


def _unit_norms(tensor: Tensor) -> Tensor:
    dims = tuple(range(1, tensor.dim())) or None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norms
