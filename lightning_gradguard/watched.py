"""What one optimizer updates: measured together, and bounded together."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.measure import NormMeter
from lightning_gradguard.respond import ClipStrategy, UpdateCap
from lightning_gradguard.respond.allowances import cap_allowances
from lightning_gradguard.respond.clippers import make_clipper, warn_of_unknown_names
from lightning_gradguard.respond.update_bounds import UpdateBound, make_bound

logger = logging.getLogger("lightning_gradguard")


def loss_sign(optimizer: Optimizer) -> int:
    """1 if the optimizer makes the loss smaller, -1 if larger, 0 if its groups differ."""
    signs = {-1 if group.get("maximize") else 1 for group in optimizer.param_groups}
    return signs.pop() if len(signs) == 1 else 0


class WatchedParameters:
    """The parameters of an optimizer as they are now; groups can be added at any time.

    Args:
        model: The module whose parameter names appear in findings.
        optimizer: The optimizer.
        cap: Cap on relative updates, or ``None`` for none.
        on_device: Whether its steps are decided on the device.
        clip: How gradients are clipped, or ``None`` for not at all.

    Attributes:
        meter: Measures their gradients.
        bound: Holds their updates to the cap; ``None`` for none.
        clipper: Clips them where one factor on all of them does not do; ``None`` for none.
        segments: Which of them are clipped together.
        zero: 0-dim, where the first of them is.
        one: 0-dim, likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        cap: UpdateCap | None,
        *,
        on_device: bool,
        clip: ClipStrategy | None = None,
    ) -> None:
        self._optimizer = optimizer
        names = {id(p): name for name, p in model.named_parameters()}
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        self._count = len(owned)
        self._trainable = [
            sum(p.requires_grad for p in group["params"]) for group in optimizer.param_groups
        ]
        self.meter = NormMeter((names.get(id(p), f"parameter_{i}"), p) for i, p in enumerate(owned))
        parameters = self.meter.parameters
        device = parameters[0].device if parameters else torch.device("cpu")
        self.zero, self.one = torch.zeros((), device=device), torch.ones((), device=device)
        self._no_loss = torch.full((), math.nan, device=device)
        self.clipper, self.segments = make_clipper(clip, optimizer, self.meter, on_device=on_device)
        warn_of_unknown_names(clip, names.values())
        self.bound: UpdateBound | None = None
        self._cap, self._on_device = cap, on_device
        self._allowances = cap_allowances(model, parameters, cap) if cap is not None else []
        if cap is None or not parameters:
            return
        if len({parameter.device for parameter in parameters}) > 1:
            logger.warning(
                "GradGuard leaves out the cap on updates: parameters are on several devices."
            )
            return
        self.bound = self._make_bound(cap)

    def _make_bound(self, cap: UpdateCap) -> UpdateBound:
        return make_bound(
            self._optimizer,
            self.meter.parameters,
            on_device=self._on_device,
            large_ratio=cap.widest_ratio,
            ordinary_ratio=cap.max_ratio,
            allowances=self._allowances,
        )

    def renew_bound(self) -> None:
        """Weights and momenta are other ones than before: what the bound knows of them is void."""
        if self.bound is not None and self._cap is not None:
            self.bound = self._make_bound(self._cap)
        if self.clipper is not None:
            self.clipper.renew()

    @property
    def movable(self) -> int:
        """How many of them a step can move: those that are trained, at a rate above 0."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        moving = [isinstance(rate, Tensor) or rate > 0.0 for rate in rates]
        return sum(count for count, moves in zip(self._trainable, moving, strict=False) if moves)

    @property
    def compounding(self) -> bool:
        """Whether some of them must not move as far as the others, see `cap_allowances`."""
        return bool(self._allowances)

    @property
    def current(self) -> bool:
        """Whether the optimizer still has as many parameters."""
        return sum(len(group["params"]) for group in self._optimizer.param_groups) == self._count

    def head(
        self,
        total: Tensor,
        loss: Tensor | float | None,
        *,
        broken: bool = False,
        signal: Tensor | None = None,
    ) -> Tensor:
        """(4 + K,) gradient norm, loss (NaN if there is none), two flags, the clipper's signal.

        In float32 whatever the model is in, so that a rank that has failed knows what to send.

        Args:
            total: The gradient norm.
            loss: The loss, if there is one.
            broken: Whether this rank has found its weights not to be finite: the first flag. The
                second is for a rank whose guard has failed.
            signal: (K,) of the clipper; ``None`` for none.
        """
        value = self._no_loss if loss is None else loss
        if isinstance(value, Tensor):
            value = value.detach().to(self.zero)
        else:
            value = self.zero.new_tensor(value)
        flag = self.one if broken else self.zero
        head = torch.stack([total.to(self.zero), value.view(()), flag, self.zero])
        return head if signal is None else torch.cat([head, signal.to(head)])

    def failure(self) -> Tensor:
        """(4 + K,) what a rank that has failed sends in place of its numbers."""
        return self.zero.repeat(4 + (0 if self.clipper is None else self.clipper.size))
