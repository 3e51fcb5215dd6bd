"""A bare torch loop under the guard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_gradguard import GuardEngine
from tests.models import Batch, Regression, adamw, fused_adamw, fused_sgd, sgd

MAKERS = {"adamw": adamw, "fused_adamw": fused_adamw, "sgd": sgd, "fused_sgd": fused_sgd}


def rmsprop(parameters: Iterable[torch.Tensor]) -> Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-2, momentum=0.5)


class Loop:
    """A model, its optimizer and the engine that guards it.

    Args:
        make_optimizer: Makes the optimizer.
        model: Default: a :class:`Regression`.
        arguments: For the engine.
    """

    def __init__(
        self,
        make_optimizer: Callable[..., Optimizer] = adamw,
        *,
        model: Regression | None = None,
        **arguments: Any,
    ) -> None:
        self.model = Regression(make_optimizer) if model is None else model
        self.optimizer: Optimizer = self.model.configure_optimizers()
        self.guard = GuardEngine(self.model, self.optimizer, **arguments)

    def step(self, batch: Batch, *, loss_scale: float = 1.0) -> None:
        self.optimizer.zero_grad()
        loss = self.model.loss(batch) * loss_scale
        loss.backward()
        self.guard.before_step(loss)
        self.optimizer.step()

    def run(self, batches: Sequence[Batch]) -> Loop:
        for batch in batches:
            self.step(batch)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}
