"""The cells of recurrent modules by their equations, one gate after the other, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Recurrent = nn.RNN | nn.LSTM | nn.GRU
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], tuple[State, Tensor]]


def directions(rnn: Recurrent) -> int:
    return 2 if rnn.bidirectional else 1


def width(rnn: Recurrent) -> int:
    """Of h as it leaves the cell."""
    return rnn.proj_size or rnn.hidden_size


def step_of(rnn: Recurrent, k: int) -> Step:
    """The cell of layer and direction ``k``: (x, state) -> (next state, the gate that explains)."""
    layer, reverse = divmod(k, directions(rnn))
    suffix = f"l{layer}" + ("_reverse" if reverse else "")
    count = {nn.RNN: 1, nn.LSTM: 4, nn.GRU: 3}[type(rnn)]

    def parts(name: str) -> Sequence[Tensor]:
        return getattr(rnn, f"{name}_{suffix}").double().chunk(count)

    w_x, w_h = parts("weight_ih"), parts("weight_hh")
    zeros = [torch.zeros(rnn.hidden_size, dtype=torch.float64)] * count
    b_x, b_h = (parts("bias_ih"), parts("bias_hh")) if rnn.bias else (zeros, zeros)

    def of_x(gate: int, x: Tensor) -> Tensor:
        return x @ w_x[gate].T + b_x[gate]

    def of_h(gate: int, h: Tensor) -> Tensor:
        return h @ w_h[gate].T + b_h[gate]

    def simple(x: Tensor, state: State) -> tuple[State, Tensor]:
        before = of_x(0, x) + of_h(0, state[0])
        if rnn.nonlinearity == "tanh":
            return (torch.tanh(before),), 1 / torch.cosh(before).square()
        return (torch.relu(before),), (before > 0).double()

    def lstm(x: Tensor, state: State) -> tuple[State, Tensor]:
        h, c = state
        i = torch.sigmoid(of_x(0, x) + of_h(0, h))
        f = torch.sigmoid(of_x(1, x) + of_h(1, h))
        g = torch.tanh(of_x(2, x) + of_h(2, h))
        o = torch.sigmoid(of_x(3, x) + of_h(3, h))
        c = f * c + i * g
        h = o * torch.tanh(c)
        if rnn.proj_size:
            h = h @ getattr(rnn, f"weight_hr_{suffix}").double().T
        return (h, c), f

    def gru(x: Tensor, state: State) -> tuple[State, Tensor]:
        (h,) = state
        r = torch.sigmoid(of_x(0, x) + of_h(0, h))
        z = torch.sigmoid(of_x(1, x) + of_h(1, h))
        n = torch.tanh(of_x(2, x) + r * of_h(2, h))
        return ((1 - z) * n + z * h,), z

    return {nn.RNN: simple, nn.LSTM: lstm, nn.GRU: gru}[type(rnn)]
