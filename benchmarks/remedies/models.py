"""Small nets that fail, each for one reason."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def deep_net(activation: Callable[[], nn.Module], layers: int = 12, width: int = 64) -> nn.Module:
    """Hidden layers of one width, torch's own initialization."""
    net: list[nn.Module] = []
    for number in range(layers):
        net += [nn.Linear(64 if number == 0 else width, width), activation()]
    return nn.Sequential(*net, nn.Linear(width, 10))


def dead_net() -> nn.Module:
    """Two ReLU layers, of which the biases of the second hold every unit at zero."""
    net = deep_net(nn.ReLU, 2)
    nn.init.constant_(net.get_parameter("2.bias"), -6.0)
    return net


def saturated_net(gain: float = 60.0) -> nn.Module:
    """Tanh layers that start with weights far too large."""
    net = deep_net(nn.Tanh, 4)
    for layer in (2, 4, 6):
        net.get_parameter(f"{layer}.weight").data.mul_(gain)
    return net


class LastStep(nn.Module):
    """A recurrent module (T, B, I) whose last output is classified."""

    def __init__(self, rnn: nn.Module, hidden_size: int, classes: int = 4) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(hidden_size, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(inputs)[0][-1])
        return logits


class Attending(LastStep):
    """The same with all outputs pooled by attention, asked by the last one."""

    def __init__(self, rnn: nn.Module, attention: nn.Module, hidden_size: int) -> None:
        super().__init__(rnn, hidden_size)
        self.attention = attention

    def forward(self, inputs: Tensor) -> Tensor:
        read, _ = self.attention(self.rnn(inputs)[0])
        logits: Tensor = self.head(read)
        return logits


class HalfForgotten(nn.Module):
    """An encoder and a narrow head, of which the encoder starts out far from useful."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3), nn.ReLU())
        self.head = nn.Linear(3, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(inputs))
        return logits


def exploding_rnn(hidden_size: int = 32, gain: float = 3.0) -> nn.Module:
    """A tanh RNN whose recurrent weights are `gain` times an orthogonal matrix."""
    rnn = nn.RNN(4, hidden_size, nonlinearity="tanh")
    nn.init.orthogonal_(rnn.get_parameter("weight_hh_l0"), gain)
    return LastStep(rnn, hidden_size)


class WithLargeHead(nn.Module):
    """A net of which one layer has inputs so large that its steps must be small."""

    def __init__(self, factor: float = 30.0) -> None:
        super().__init__()
        self.factor = factor
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)
        self.head.weight.data.div_(factor)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.factor * self.body(inputs))
        return logits
