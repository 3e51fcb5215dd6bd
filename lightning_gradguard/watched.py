"""What one optimizer updates: measured together, and bounded together."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.measure import NormMeter
from lightning_gradguard.respond import UpdateCap
from lightning_gradguard.respond.update_bounds import UpdateBound, make_bound

logger = logging.getLogger("lightning_gradguard")


class WatchedParameters:
    """The parameters of an optimizer as they are now; groups can be added at any time.

    Args:
        model: The module whose parameter names appear in findings.
        optimizer: The optimizer.
        cap: Cap on relative updates, or ``None`` for none.
        on_device: Whether its steps are decided on the device.

    Attributes:
        meter: Measures their gradients.
        bound: Holds their updates to the cap; ``None`` for none.
        zero: 0-dim, where the first of them is.
        one: 0-dim, likewise.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, cap: UpdateCap | None, *, on_device: bool
    ) -> None:
        self._optimizer = optimizer
        names = {id(p): name for name, p in model.named_parameters()}
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        self._count = len(owned)
        self.meter = NormMeter((names.get(id(p), f"parameter_{i}"), p) for i, p in enumerate(owned))
        parameters = self.meter.parameters
        device = parameters[0].device if parameters else torch.device("cpu")
        self.zero, self.one = torch.zeros((), device=device), torch.ones((), device=device)
        self._no_loss = torch.full((), math.nan, device=device)
        self.bound: UpdateBound | None = None
        if cap is None or not parameters:
            return
        if len({parameter.device for parameter in parameters}) > 1:
            logger.warning(
                "GradGuard leaves out the cap on updates: parameters are on several devices."
            )
            return
        self.bound = make_bound(
            optimizer, parameters, on_device=on_device, large_ratio=cap.large_ratio
        )

    @property
    def current(self) -> bool:
        """Whether the optimizer still has as many parameters."""
        return sum(len(group["params"]) for group in self._optimizer.param_groups) == self._count

    def head(self, total: Tensor, loss: Tensor | float | None) -> Tensor:
        """(3,) gradient norm, loss (NaN if there is none), room for the flag of a failed rank.

        In float32 whatever the model is in, so that a rank that has failed knows what to send.
        """
        value = self._no_loss if loss is None else loss
        if isinstance(value, Tensor):
            value = value.detach().to(self.zero)
        else:
            value = self.zero.new_tensor(value)
        return torch.stack([total.to(self.zero), value.view(()), self.zero])

    def failure(self) -> Tensor:
        """(3,) what a rank that has failed sends in place of its numbers."""
        return torch.stack([self.zero] * 3)
