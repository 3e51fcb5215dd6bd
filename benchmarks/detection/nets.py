"""The networks that are trained, small enough for a step in a millisecond or a few.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input, ``H`` hidden, ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

MakeModule = Callable[[], nn.Module]
RECURRENT: dict[str, type[nn.LSTM | nn.GRU | nn.RNN]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": nn.RNN,
}


def mlp(
    widths: Sequence[int],
    activation: MakeModule = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """Linear layers with an activation after each but the last, and a norm before it if given."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers.append(nn.Linear(fan_in, fan_out))
        if norm is not None:
            layers.append(norm(fan_out))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def deep(layers: int, width: int = 64) -> list[int]:
    """Widths of an MLP for digits with so many linear layers."""
    return [64, *[width] * (layers - 1), 10]


def cnn(
    channels: Sequence[int] = (1, 16, 32),
    activation: MakeModule = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """Convolutions of 3x3 over an image of 8x8, mean pooling to 2x2, and a linear head."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(channels):
        layers.append(nn.Conv2d(fan_in, fan_out, 3, padding=1))
        if norm is not None:
            layers.append(norm(fan_out))
        layers.append(activation())
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], 10)
    )


class Recurrent(nn.Module):
    """One recurrent layer and a linear head on its last output."""

    rnn: nn.LSTM | nn.GRU | nn.RNN

    def __init__(self, kind: str, input_size: int, hidden_size: int, outputs: int) -> None:
        super().__init__()
        options = {"nonlinearity": kind} if kind in ("tanh", "relu") else {}
        self.rnn = RECURRENT[kind](input_size, hidden_size, batch_first=True, **options)
        self.head = nn.Linear(hidden_size, outputs)

    @override
    def forward(self, inputs_BTI: Tensor) -> Tensor:
        output_BTH, _ = self.rnn(inputs_BTI)
        head: Tensor = self.head(output_BTH[:, -1])
        return head


class Residual(nn.Module):
    """A linear layer and an activation beside a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.activation = nn.ReLU()

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        change: Tensor = self.activation(self.linear(inputs))
        return inputs + change


class Attention(nn.Module):
    """A transformer block that normalizes first."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    @override
    def forward(self, state_BTH: Tensor) -> Tensor:
        normed_BTH = self.norm1(state_BTH)
        mixed_BTH, _ = self.attention(normed_BTH, normed_BTH, normed_BTH, need_weights=False)
        state_BTH = state_BTH + mixed_BTH
        fed_BTH: Tensor = self.feed(self.norm2(state_BTH))
        return state_BTH + fed_BTH


class Transformer(nn.Module):
    """Blocks over the 8 rows of a digit, and a head on their mean."""

    def __init__(self, blocks: int = 2, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    @override
    def forward(self, rows_BTI: Tensor) -> Tensor:
        state_BTH = self.blocks(self.embed(rows_BTI) + self.place)
        head: Tensor = self.head(self.norm(state_BTH).mean(1))
        return head


class Calls(nn.Module):
    """A function as a module, as users wrap what has no weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self._function(inputs)


def with_weights(model: nn.Module, draw: Callable[[Tensor], object]) -> nn.Module:
    """The model with its weights drawn anew and its biases at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                draw(parameter)
            else:
                parameter.zero_()
    return model


def with_memory(model: Recurrent, draw: Callable[[Tensor], object]) -> Recurrent:
    """The model with the matrix from each state to the next drawn anew, and no biases there."""
    with torch.no_grad():
        for name, parameter in model.rnn.named_parameters():
            if name.startswith("weight_hh"):
                draw(parameter)
            elif name.startswith("bias"):
                parameter.zero_()
    return model
