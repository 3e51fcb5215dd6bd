"""Modules and models that make NaN or Inf at a chosen place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

B, T, F = 4, 7, 5


def sequences(*, batch_first: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(B, T, F, generator=generator)
    return inputs if batch_first else inputs.transpose(0, 1).contiguous()


class _Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN at one place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: tuple[int, ...]) -> Tensor:
        ctx.place = place
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.place] = math.nan
        return grad, None


class Source(nn.Module):
    """A layer that makes a NaN on the way forth or back, or does not.

    Attributes:
        forth: Place in its output, ``None`` for nowhere.
        back: Place in the gradient of its input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(F, F)
        self.forth: tuple[int, ...] | None = None
        self.back: tuple[int, ...] | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self.back is not None:
            values = _Poison.apply(values, self.back)
        values = self.linear(values)
        if self.forth is not None:
            hole = torch.zeros_like(values)
            hole[self.forth] = math.nan
            values = values + hole
        return values


class Stack(nn.Module):
    """Sources one after the other, in nested blocks, around a recurrent module.

    Args:
        batch_first: Layout of everything.
    """

    PATHS = ("first", "block.0", "block.1.0", "last")

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first = Source()
            self.rnn = nn.GRU(F, F, batch_first=batch_first)
            self.block = nn.Sequential(Source(), nn.Sequential(Source(), nn.ReLU()))
            self.last = Source()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.first(inputs))
        hidden = hidden + self.block(hidden)
        result: Tensor = self.last(hidden)
        return result


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = model(batch)
    return output.square().mean()
