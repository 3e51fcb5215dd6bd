"""The runs that are to be saved: a task, a net, a budget and a grid of learning rates.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from benchmarks.detection.nets import Recurrent, Transformer, deep, mlp
from benchmarks.rescue.tasks import Task, addition, characters, digits, order

OPTIMIZERS = ("sgd", "adamw")
# Every half decade over four decades, from ordinary to far too large.
_POINTS = 9


@dataclass(frozen=True)
class Workload:
    """One net on one task.

    Attributes:
        name: As in the tables.
        task: Makes the task.
        net: Makes the net, from the global random numbers.
        steps: Budget.
        first_rates: The smallest learning rate of the grid under each optimizer, as power of ten.
        ordinary: Optimizer and learning rate at which the run is healthy, for faults on top.
        development: Whether the defaults of the guard were tuned on it, at its first seeds.
    """

    name: str
    task: Callable[[], Task]
    net: Callable[[], nn.Module]
    steps: int
    first_rates: dict[str, float]
    ordinary: tuple[str, float]
    development: bool

    def rates(self, optimizer: str) -> list[float]:
        """The grid of learning rates."""
        first = self.first_rates[optimizer]
        return [float(f"{10 ** (first + n / 2):.3g}") for n in range(_POINTS)]


def make_optimizer(name: str, model: nn.Module, lr: float) -> Optimizer:
    """SGD with momentum, or AdamW as torch sets it up."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=lr)


class CharacterModel(nn.Module):
    """An LSTM and a head on each of its outputs."""

    def __init__(self, characters: int = 64, hidden_size: int = 64) -> None:
        super().__init__()
        self.rnn = nn.LSTM(characters, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, characters)

    @override
    def forward(self, inputs_BTI: Tensor) -> Tensor:
        outputs_BTH, _ = self.rnn(inputs_BTI)
        logits: Tensor = self.head(outputs_BTH)
        return logits


def _weight(net: Recurrent, name: str) -> nn.Parameter:
    return net.rnn.get_parameter(name)


def _identity_rnn() -> nn.Module:
    """A ReLU RNN that starts from the identity, without biases to move (Le et al. 2015)."""
    net = Recurrent("relu", 1, 32, 10)
    with torch.no_grad():
        nn.init.eye_(_weight(net, "weight_hh_l0"))
        nn.init.zeros_(_weight(net, "bias_hh_l0"))
        nn.init.zeros_(_weight(net, "bias_ih_l0"))
    return net


def _remembering(inputs: int, outputs: int) -> nn.Module:
    """An LSTM whose forget gates are open at the start (Jozefowicz et al. 2015)."""
    net = Recurrent("lstm", inputs, 32, outputs)
    with torch.no_grad():
        _weight(net, "bias_ih_l0")[32:64].fill_(2.0)
    return net


def _deep_mlp() -> nn.Module:
    """Twelve linear layers with ReLU between them, after He et al. (2015)."""
    net = mlp(deep(12))
    for parameter in net.parameters():
        if parameter.dim() == 2:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)
    return net


def _pixels() -> Task:
    return digits("pixels", 32)


WORKLOADS = (
    Workload(
        "digits_tanh",
        _pixels,
        lambda: Recurrent("tanh", 1, 32, 10),
        300,
        {"sgd": -2.5, "adamw": -3.5},
        ("adamw", 0.003),
        development=True,
    ),
    Workload(
        "digits_irnn",
        _pixels,
        _identity_rnn,
        300,
        {"sgd": -4.5, "adamw": -4.0},
        ("adamw", 0.0003),
        development=True,
    ),
    Workload(
        "digits_lstm",
        _pixels,
        lambda: Recurrent("lstm", 1, 32, 10),
        300,
        {"sgd": -1.5, "adamw": -3.0},
        ("sgd", 0.1),
        development=True,
    ),
    Workload(
        "digits_gru",
        _pixels,
        lambda: Recurrent("gru", 1, 32, 10),
        200,
        {"sgd": -1.5, "adamw": -3.0},
        ("adamw", 0.01),
        development=True,
    ),
    Workload(
        "characters",
        lambda: characters(32, 16),
        CharacterModel,
        300,
        {"sgd": -1.5, "adamw": -3.0},
        ("adamw", 0.01),
        development=True,
    ),
    Workload(
        "order_100",
        lambda: order(100, 32),
        lambda: _remembering(6, 4),
        600,
        {"sgd": -1.5, "adamw": -3.5},
        ("adamw", 0.001),
        development=False,
    ),
    Workload(
        "adding_50",
        lambda: addition(50, 32),
        lambda: _remembering(2, 1),
        900,
        {"sgd": -2.0, "adamw": -3.0},
        ("adamw", 0.01),
        development=True,
    ),
    Workload(
        "mlp_12",
        lambda: digits("vector", 64),
        _deep_mlp,
        300,
        {"sgd": -3.0, "adamw": -4.0},
        ("sgd", 0.01),
        development=True,
    ),
    Workload(
        "transformer",
        lambda: digits("rows", 32),
        lambda: Transformer(2, 32),
        300,
        {"sgd": -2.0, "adamw": -3.5},
        ("sgd", 0.03),
        development=True,
    ),
)
