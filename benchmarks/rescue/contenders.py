"""What is added to a run: nothing, the guard, or a re-implementation of a peer's rule.

ZClip is its authors' package. All others follow their papers with the published defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from benchmarks.rescue.stable_adamw import StableAdamW
from benchmarks.rescue.workloads import make_optimizer
from lightning_gradguard import GuardEngine


class Protection(Protocol):
    """Acts on one run."""

    def before_step(self, loss: Tensor) -> None:
        """Between the backward pass and the optimizer's step."""

    def after_step(self, loss: Tensor) -> None:
        """After the optimizer's step."""

    def close(self) -> None:
        """The run is over."""


class Nothing:
    """What a protection does unless it says otherwise."""

    def before_step(self, loss: Tensor) -> None:
        """Nothing."""

    def after_step(self, loss: Tensor) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class FixedClip(Nothing):
    """torch's ``clip_grad_norm_``."""

    def __init__(self, model: nn.Module, max_norm: float) -> None:
        self._parameters = list(model.parameters())
        self._max_norm = max_norm

    def before_step(self, loss: Tensor) -> None:
        """Clips the total norm."""
        clip_grad_norm_(self._parameters, self._max_norm)


class AutoClip(Nothing):
    """Clips to the 10th percentile of all norms so far (Seetharaman et al. 2020)."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._norms: list[float] = []

    def before_step(self, loss: Tensor) -> None:
        """Takes in the norm, then clips."""
        self._norms.append(float(nn.utils.get_total_norm(_gradients(self._parameters))))
        clip_grad_norm_(self._parameters, float(np.percentile(self._norms, 10)))


class ZClipPackage(Nothing):
    """ZClip 1.0 with its defaults."""

    def __init__(self, model: nn.Module) -> None:
        from zclip import ZClip

        self._model, self._clip = model, ZClip()

    def before_step(self, loss: Tensor) -> None:
        """What its documentation shows."""
        self._clip.step(self._model)


class AGC(Nothing):
    """Clips every unit to 1% of its own norm, all but the head (Brock et al. 2021)."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        last = named[-1][0].rpartition(".")[0]
        self._parameters = [p for name, p in named if name.rpartition(".")[0] != last]

    @torch.no_grad()
    def before_step(self, loss: Tensor) -> None:
        """Clips unit by unit."""
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            limit = _unit_norms(parameter).clamp_(min=1e-3).mul_(0.01)
            norm = _unit_norms(gradient)
            clipped = gradient * (limit / norm.clamp(min=1e-6))
            gradient.copy_(torch.where(norm < limit, gradient, clipped))


class AdaGC(Nothing):
    """Clips every tensor to 1.05 times the mean of its clipped norms (arXiv 2502.11034).

    For the first 100 steps the total norm is clipped to 1, and the mean starts at the least norm
    of each tensor seen in them.
    """

    warmup, factor, decay = 100, 1.05, 0.98

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._means = [math.inf] * len(self._parameters)
        self._step = 0

    @torch.no_grad()
    def before_step(self, loss: Tensor) -> None:
        """Clips tensor by tensor."""
        self._step += 1
        warm = self._step <= self.warmup
        if warm:
            clip_grad_norm_(self._parameters, 1.0)
        gradients = _gradients(self._parameters)
        norms = torch.stack(torch._foreach_norm(gradients)).tolist()
        for number, (gradient, norm) in enumerate(zip(gradients, norms, strict=True)):
            mean = self._means[number]
            if warm:
                self._means[number] = min(mean, norm)
                continue
            scale = min(self.factor * mean / norm, 1.0) if norm else 1.0
            gradient.mul_(scale)
            self._means[number] = self.decay * mean + (1.0 - self.decay) * scale * norm


class Plateau(Nothing):
    """torch's ``ReduceLROnPlateau``: halves the rate after 2 of 20 parts without a better loss."""

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self._schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
        self._every = max(steps // 20, 1)
        self._losses: list[float] = []

    def after_step(self, loss: Tensor) -> None:
        """Takes in the mean loss of each part of the run."""
        self._losses.append(float(loss))
        if len(self._losses) == self._every:
            self._schedule.step(sum(self._losses) / self._every)
            self._losses.clear()


class Guard(Nothing):
    """``GradGuard()`` as it comes, without a Trainer around it."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        self.engine = GuardEngine(model, optimizer, planned_steps=steps)

    def before_step(self, loss: Tensor) -> None:
        """All it needs to be told."""
        self.engine.before_step(loss)

    def close(self) -> None:
        """Takes it off."""
        self.engine.close()


Start = Callable[[nn.Module, Optimizer, int], Protection]


@dataclass(frozen=True)
class Contender:
    """One way of protecting runs.

    Attributes:
        name: As in the tables.
        start: Makes the protection of one run, from model, optimizer and number of steps.
        optimizers: Those that it can be used with.
        revives: Whether it may bring back weights that are not finite; of the others such a run is
            over.
        own_optimizer: Replaces AdamW, by its parameters and rate.
    """

    name: str
    start: Start
    optimizers: tuple[str, ...] = ("sgd", "adamw")
    revives: bool = False
    own_optimizer: Callable[[nn.Module, float], Optimizer] | None = None

    def optimizer(self, name: str, model: nn.Module, lr: float) -> Optimizer:
        """The optimizer of a run."""
        if self.own_optimizer is not None:
            return self.own_optimizer(model, lr)
        return make_optimizer(name, model, lr)


GUARD = "GradGuard()"
BARE = "no guard"

CONTENDERS = (
    Contender(BARE, lambda model, optimizer, steps: Nothing()),
    Contender("clip 1.0", lambda model, optimizer, steps: FixedClip(model, 1.0)),
    Contender("clip 0.1", lambda model, optimizer, steps: FixedClip(model, 0.1)),
    Contender("AutoClip", lambda model, optimizer, steps: AutoClip(model)),
    Contender("ZClip", lambda model, optimizer, steps: ZClipPackage(model)),
    Contender("AGC", lambda model, optimizer, steps: AGC(model)),
    Contender("AdaGC", lambda model, optimizer, steps: AdaGC(model)),
    Contender("ReduceLROnPlateau", lambda model, optimizer, steps: Plateau(optimizer, steps)),
    Contender(
        "StableAdamW",
        lambda model, optimizer, steps: Nothing(),
        optimizers=("adamw",),
        own_optimizer=lambda model, lr: StableAdamW(model.parameters(), lr=lr),
    ),
    Contender(GUARD, Guard, revives=True),
)


def select(names: Sequence[str]) -> list[Contender]:
    """The contenders of these names; all for none."""
    known = {contender.name: contender for contender in CONTENDERS}
    return [known[name] for name in names] if names else list(CONTENDERS)


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _unit_norms(tensor: Tensor) -> Tensor:
    dims = tuple(range(1, tensor.dim())) or None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norms
