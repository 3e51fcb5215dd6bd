"""AdamW with update clipping, written from its paper (Wortsman et al. 2023, arXiv 2304.13013)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override


class StableAdamW(Optimizer):
    """Divides each tensor's learning rate by the root mean square of g²/v where that exceeds 1.

    Args:
        params: Parameters.
        lr: Learning rate.
        betas: Decay of the moments; the paper uses 0.9 and 0.99.
        eps: Least root of the second moment.
        weight_decay: Decoupled, as torch's AdamW has it by default.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = (_debiased(beta, state["step"]) for beta in group["betas"])
        mean, square, eps = state["mean"], state["square"], group["eps"]
        mean.lerp_(gradient, 1.0 - beta1)
        square.lerp_(gradient.square(), 1.0 - beta2)
        excess = (gradient.square() / square.clamp_min(eps**2)).mean().sqrt()
        rate = group["lr"] / excess.clamp_min(1.0)
        parameter.mul_(1.0 - rate * group["weight_decay"])
        parameter.sub_(rate * mean / (square.sqrt() + eps))


def _debiased(beta: float, step: int) -> float:
    """The decay at a step with which the moments need no correction of their bias."""
    return (beta - beta**step) / (1.0 - beta**step)
