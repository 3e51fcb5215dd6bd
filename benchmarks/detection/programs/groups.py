"""Parameter groups: learning rates of zero, far too small or too large, and sensible ones."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam
from typing_extensions import override

from benchmarks.detection.nets import Recurrent, mlp
from benchmarks.detection.programs.family import Family
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import DIGITS, Digits, classification
from lightning_gradguard.diagnose import Pathology

_ZERO = Family("zero_learning_rate")
_SLOW = Family("slow_layer")
_FAST = Family("fast_layer")

_STEPS = 1000


class Projected(nn.Module):
    """Each row of a digit as one number, then a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 1)
        self.net = Recurrent("gru", 1, 48, 10)

    @override
    def forward(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.net(self.project(rows))
        return scores


class WithSpareHead(nn.Module):
    """A classifier with a second head that nothing is asked of."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp([64, 64, 64])
        self.head = nn.Linear(64, 10)
        self.spare = nn.Linear(64, 5)

    @override
    def forward(self, pixels: Tensor) -> Tensor:
        head: Tensor = self.head(self.trunk(pixels).relu())
        return head


def _grouped(net: nn.Module, first: nn.Module, first_lr: float, lr: float, data: Digits) -> Setup:
    """One part of the network has a learning rate of its own."""
    of_first = {id(parameter) for parameter in first.parameters()}
    others = [p for p in net.parameters() if id(p) not in of_first]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": list(first.parameters()), "lr": first_lr},
    ]
    return classification(net, Adam(groups, lr=lr), data)


def _projected(first_lr: float, seed: int) -> Setup:
    net = Projected()
    return _grouped(net, net.project, first_lr, 3e-3, Digits(seed, "rows"))


def _bottleneck(first_lr: float, seed: int) -> Setup:
    net = mlp((64, 6, 64, 10))
    return _grouped(net, net[0], first_lr, 5e-3, Digits(seed))


def _recurrence(first_lr: float, seed: int) -> Setup:
    net = Recurrent("gru", 8, 48, 10)
    return _grouped(net, net.rnn, first_lr, 1e-3, Digits(seed, "rows"))


def _spare_head(seed: int) -> Setup:
    net = WithSpareHead()
    return classification(net, SGD(net.parameters(), lr=0.05, momentum=0.9), Digits(seed))


PROGRAMS: tuple[Program, ...] = (
    _ZERO.failing(
        "gru_group_lr_0",
        partial(_projected, 0.0),
        _STEPS,
        DIGITS,
        (Pathology.LAYER_NOT_TRAINING,),
        "A parameter group whose learning rate is 0.",
        layers=("project",),
    ),
    _ZERO.healthy(
        "mlp_spare_head", _spare_head, _STEPS, DIGITS, "A head that nothing is asked of."
    ),
    _SLOW.failing(
        "mlp_group_lr_/1e5",
        partial(_bottleneck, 5e-8),
        _STEPS,
        DIGITS,
        (Pathology.UPDATE_OUT_OF_RANGE,),
        "A layer with a learning rate a hundred thousand times smaller than the others'.",
        layers=("0", "1"),
    ),
    _SLOW.healthy(
        "mlp_group_lr_/3",
        partial(_bottleneck, 2e-3),
        _STEPS,
        DIGITS,
        "A layer with a somewhat smaller one, as is usual in fine-tuning.",
    ),
    _FAST.failing(
        "gru_recurrence_lr_x1000",
        partial(_recurrence, 1.0),
        _STEPS,
        DIGITS,
        (
            Pathology.UPDATE_OUT_OF_RANGE,
            Pathology.SATURATED,
        ),
        "A recurrent layer with a thousand times the learning rate of the head.",
        layers=("rnn",),
    ),
    _FAST.healthy(
        "gru_recurrence_lr_x10",
        partial(_recurrence, 1e-2),
        _STEPS,
        DIGITS,
        "The same layer with ten times that of the head.",
    ),
)
