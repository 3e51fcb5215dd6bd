"""Layers that do not train, by mistake or on purpose."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import Adam
from typing_extensions import override

from benchmarks.detection.nets import Recurrent, mlp
from benchmarks.detection.programs.family import Family
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import (
    DIGITS,
    DIGITS_IN_TIME,
    RECENT_SUM,
    Batch,
    Digits,
    Sequences,
    classification,
    recent_sum,
    regression,
)
from lightning_gradguard.diagnose import Pathology

_MISSING = Family("not_in_optimizer")
_DETACHED = Family("detached")
_WITHOUT_GRAD = Family("without_grad")

_STEPS = 1000
# Everything has to pass through so few units that random ones do not do.
_BOTTLENECK = (64, 6, 64, 10)


class Encoded(nn.Module):
    """A convolution as wide as the image, and a classifier on its few channels.

    Args:
        detach: Cut the graph between the two.
    """

    def __init__(self, *, detach: bool) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 4, 8)
        self.classifier = mlp([4, 64, 10])
        self._detach = detach

    @override
    def forward(self, images: Tensor) -> Tensor:
        code = self.encoder(images).flatten(1)
        scores: Tensor = self.classifier(code.detach() if self._detach else code)
        return scores


class Summarized(nn.Module):
    """A small recurrent network whose last output a larger one classifies.

    Args:
        grad: Whether the first part runs with gradients on.
    """

    def __init__(self, *, grad: bool) -> None:
        super().__init__()
        self.summary = Recurrent("gru", 8, 32, 4)
        self.classifier = mlp([4, 64, 10])
        self._grad = grad

    @override
    def forward(self, rows: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._grad and torch.is_grad_enabled()):
            code = self.summary(rows)
        scores: Tensor = self.classifier(code)
        return scores


class Truncated(nn.Module):
    """A GRU that carries its state, but no gradient, from one chunk of the sequence to the next."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, 32, batch_first=True)
        self.head = nn.Linear(32, 1)
        self._chunk = chunk

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        state: Tensor | None = None
        for piece in inputs.split(self._chunk, dim=1):
            _, state = self.rnn(piece, None if state is None else state.detach())
        if state is None:
            raise ValueError("inputs must have at least one timestep, got none")
        head: Tensor = self.head(state[-1])
        return head


def _replaced(seed: int) -> Setup:
    """The optimizer holds the parameters of the layer that was there before."""
    net = mlp(_BOTTLENECK)
    optimizer = Adam(net.parameters(), lr=3e-3)
    net[0] = nn.Linear(64, 6)
    return classification(net, optimizer, Digits(seed))


def _fine_tuned(seed: int) -> Setup:
    net = mlp(_BOTTLENECK)
    before = classification(net, Adam(net.parameters(), lr=5e-3), Digits(seed + 1))
    for step in range(600):
        before.optimizer.zero_grad()
        before.loss(before.batch(step)).backward()
        before.optimizer.step()
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    net[2], net[4] = nn.Linear(6, 64), nn.Linear(64, 10)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return classification(net, Adam(trained, lr=3e-3), Digits(seed))


def _encoded(detach: bool, seed: int) -> Setup:
    net = Encoded(detach=detach)
    return classification(net, Adam(net.parameters(), lr=3e-3), Digits(seed, "image"))


def _truncated(seed: int) -> Setup:
    net = Truncated(20)
    return regression(net, Adam(net.parameters(), lr=3e-3), Sequences(seed, recent_sum(60, 5)))


def _summarized(grad: bool, seed: int) -> Setup:
    net = Summarized(grad=grad)
    return classification(net, Adam(net.parameters(), lr=3e-3), Digits(seed, "rows"))


def _teacher(seed: int) -> Setup:
    """A slow copy of the network, without gradients, whose answers it is to agree with."""
    student = Recurrent("gru", 8, 48, 10)
    teacher = deepcopy(student).requires_grad_(False)
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    setup = classification(student, Adam(student.parameters(), lr=3e-3), Digits(seed, "rows"))
    setup.model = both

    def loss(batch: Batch) -> Tensor:
        scores = student(batch[0])
        with torch.no_grad():
            wanted = teacher(batch[0])
        return cross_entropy(scores, batch[1]) + 0.1 * mse_loss(scores, wanted)

    def follow(step: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)

    setup.loss, setup.after_step = loss, follow
    return setup


_NOT_TRAINING = (Pathology.LAYER_NOT_TRAINING,)

PROGRAMS: tuple[Program, ...] = (
    _MISSING.failing(
        "mlp_replaced_layer",
        _replaced,
        _STEPS,
        DIGITS,
        _NOT_TRAINING,
        "A layer that was replaced after the optimizer had been made.",
        layers=("0",),
    ),
    _MISSING.healthy(
        "mlp_fine_tuned", _fine_tuned, _STEPS, DIGITS, "A trained layer frozen by a declaration."
    ),
    _DETACHED.failing(
        "cnn_detached_encoder",
        partial(_encoded, True),
        _STEPS,
        DIGITS,
        _NOT_TRAINING,
        "A graph that is cut behind the encoder.",
        layers=("encoder",),
    ),
    _DETACHED.healthy(
        "gru_truncated", _truncated, _STEPS, RECENT_SUM, "Truncated backpropagation, on purpose."
    ),
    _WITHOUT_GRAD.failing(
        "gru_block_without_grad",
        partial(_summarized, False),
        _STEPS,
        DIGITS,
        _NOT_TRAINING,
        "A block that runs with gradients turned off.",
        layers=("summary", "summary.rnn", "summary.head"),
    ),
    _WITHOUT_GRAD.healthy(
        "gru_mean_teacher",
        _teacher,
        _STEPS,
        DIGITS_IN_TIME,
        "A teacher that follows its student and gets no gradient.",
    ),
)
