"""Optimizers of every family, and a loop that holds their updates to a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.guard import DEVICE_DELAY
from lightning_gradguard.measure import NormMeter
from lightning_gradguard.measure.readback import DelayedRead
from lightning_gradguard.measure.updates import RMS_FLOOR
from lightning_gradguard.respond.update_bounds import UpdateBound, make_bound

Make = Callable[[Iterable[Any]], Optimizer]


class SignMomentum(Optimizer):
    """An optimizer that is none of torch's: the sign of an average of gradients (Lion)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                average = state.setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1.0 - group["beta"])
                p.sub_(average.sign(), alpha=group["lr"])


class HeavyBall(torch.optim.SGD):
    """A subclass, of which nothing may be assumed."""


O = torch.optim  # noqa: E741
SGD: dict[str, Make] = {
    "sgd": lambda p: O.SGD(p, lr=0.1),
    "sgd momentum": lambda p: O.SGD(p, lr=0.1, momentum=0.9),
    "sgd dampened": lambda p: O.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "sgd nesterov": lambda p: O.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd weight decay": lambda p: O.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "sgd loop": lambda p: O.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "sgd fused": lambda p: O.SGD(p, lr=0.1, momentum=0.9, fused=True),
}
# One step of these is about ``lr`` in every element.
NORMALIZING: dict[str, Make] = {
    "adam": lambda p: O.Adam(p, lr=1e-3),
    "adam amsgrad": lambda p: O.Adam(p, lr=1e-3, amsgrad=True),
    "adam fused": lambda p: O.Adam(p, lr=1e-3, fused=True),
    "adamw": lambda p: O.AdamW(p, lr=1e-3),
    "adamw loop": lambda p: O.AdamW(p, lr=1e-3, foreach=False),
    "adamw fused": lambda p: O.AdamW(p, lr=1e-3, fused=True),
    "nadam": lambda p: O.NAdam(p, lr=1e-3),
    "radam": lambda p: O.RAdam(p, lr=1e-3),
    "adamax": lambda p: O.Adamax(p, lr=1e-3),
    "rmsprop": lambda p: O.RMSprop(p, lr=1e-3),
    "rmsprop momentum": lambda p: O.RMSprop(p, lr=1e-3, momentum=0.9),
    "rmsprop centered": lambda p: O.RMSprop(p, lr=1e-3, centered=True),
    "adagrad": lambda p: O.Adagrad(p, lr=1e-2),
}
OTHERS: dict[str, Make] = {
    "lion": lambda p: SignMomentum(p, lr=1e-3),
    "sgd subclass": lambda p: HeavyBall(p, lr=0.1, momentum=0.9),
    "rprop": lambda p: O.Rprop(p, lr=1e-3),
    "asgd": lambda p: O.ASGD(p, lr=0.1),
    "adadelta": lambda p: O.Adadelta(p, lr=1.0),
}
if hasattr(O, "Adafactor"):  # torch 2.5
    OTHERS["adafactor"] = lambda p: O.Adafactor(p, lr=1e-2)
if hasattr(O, "Muon"):  # torch 2.9; matrices only
    OTHERS["muon"] = lambda p: O.Muon([q for q in p if q.dim() == 2], lr=1e-2)
ALL = {**SGD, **NORMALIZING, **OTHERS}


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix that is sampled, a small one that is read as a whole, and a bias at zero."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(s, generator=generator) for s in ((16, 10), (6, 4), (5,))]
    tensors[1] *= 0.05
    tensors[2] *= 0.0
    return [nn.Parameter(t.to(dtype)) for t in tensors]


def gradient_steps(
    parameters: Sequence[Tensor], factors: Iterable[float], seed: int = 0
) -> Iterator[None]:
    """Random gradients on the parameters, one set for each factor that they are multiplied by."""
    generator = torch.Generator().manual_seed(seed)
    for factor in factors:
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype.to_real())
            p.grad = (noise * factor).to(p.dtype)
        yield


def relative_changes(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """‖ΔW‖ / max(‖W‖, floor) of each tensor, by definition, in double precision."""
    wide = torch.complex128 if before[0].is_complex() else torch.float64
    ratios = []
    for old, new in zip(before, after, strict=True):
        change = (new.detach().to(wide) - old.to(wide)).norm().item()
        floor = RMS_FLOOR * math.sqrt(old.numel())
        ratios.append(change / max(old.to(wide).norm().item(), floor))
    return ratios


@dataclass
class Bounded:
    """Steps an optimizer under a bound in the way the engine does, and looks at each update."""

    optimizer: Optimizer
    max_ratio: float
    on_device: bool = False
    allowances: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.meter = NormMeter((f"p{i}", p) for i, p in enumerate(self.parameters))
        self.bound: UpdateBound = make_bound(
            self.optimizer,
            self.parameters,
            on_device=self.on_device,
            allowances=self.allowances,
        )
        self.late: DelayedRead[None] = DelayedRead(DEVICE_DELAY)
        self.seen: list[float] = []
        self.held_back: list[int] = []

    def step(self, coefficient: float = 1.0) -> list[float]:
        """One step; returns the relative change of every tensor."""
        before = [p.detach().clone() for p in self.parameters]
        signal = self.bound.signal(self.meter.measure())
        seen = [] if signal is None else signal.tolist()
        if self.on_device:
            seen, self.seen = self.seen, []
        self.bound.before_step(
            self.max_ratio, torch.tensor(coefficient) if self.on_device else coefficient, seen
        )
        self.optimizer.step()
        self.held_back.append(int(self.bound.after_step()))
        if self.on_device:
            entry = torch.zeros(0) if signal is None else signal
            for _, values in self.late.push(None, entry):
                self.seen = values
        return relative_changes(before, self.parameters)
