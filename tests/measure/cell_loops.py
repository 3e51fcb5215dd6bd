"""Cells in a loop, the fused modules that they equal, and what a probe reads of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.measure.timesteps import TimestepProbe
from lightning_gradguard.readings import TimeReading

T, B, I, H = 25, 8, 3, 6  # noqa: E741 - input

FUSED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.RNNCell: nn.RNN,
    nn.LSTMCell: nn.LSTM,
    nn.GRUCell: nn.GRU,
}

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda output: output[-1].pow(2).sum(),
    "every": lambda output: output.pow(2).sum(),
    "ragged": lambda output: output[torch.arange(B) + T - B, torch.arange(B)].sum(),
}


class Loop(nn.Module):
    def __init__(self, cell: nn.Module, *, keyword: bool = False) -> None:
        super().__init__()
        self.cell = cell
        self.keyword = keyword

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        outputs = []
        for x_t in x:
            state = self.cell(input=x_t, hx=state) if self.keyword else self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


def pair(cell: type[nn.Module], **options: Any) -> tuple[Loop, nn.Module]:
    """A loop of cells and the fused module with the same weights."""
    loop, fused = Loop(cell(I, H, **options)), FUSED[cell](I, H, **options)
    fused.load_state_dict({f"{name}_l0": value for name, value in loop.cell.state_dict().items()})
    return loop, fused


def readings(model: nn.Module, loss: Callable[[], Tensor]) -> list[TimeReading]:
    with TimestepProbe(model) as probe:
        loss().sum().backward()
        return probe.measure()


def rate_of(states: list[Tensor]) -> float:
    """The rate that the gradients retained on the states of a loop show."""
    norms = [state.grad.double().norm().item() for state in states]
    return math.log(norms[0] / norms[-1]) / (len(norms) - 1)
