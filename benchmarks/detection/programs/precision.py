"""Half precision without loss scaling, and losses that are merely small or large."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam

from benchmarks.detection.nets import Recurrent, cnn, deep, mlp
from benchmarks.detection.programs.family import Family
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import DIGITS, Batch, Digits, classification
from lightning_gradguard.diagnose import Pathology

_UNDERFLOW = Family("underflow")
_UNDERFLOW_RECURRENT = Family("underflow_recurrent")

_STEPS = 1000
# A loss averaged over more than was summed, which a learning rate makes up for.
_SMALL = 1e-5
_TINY = 1e-6


def _autocast(net: nn.Module, scale: float, batch: Batch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return cross_entropy(net(batch[0]), batch[1]) * scale


def _half_mlp(seed: int) -> Setup:
    """In float32 it trains like its twin with a learning rate of 0.02."""
    net = mlp(deep(4))
    setup = classification(net, SGD(net.parameters(), lr=0.02 / _SMALL, momentum=0.9), Digits(seed))
    setup.loss = partial(_autocast, net, _SMALL)
    return setup


def _half_gru(scale: float, seed: int) -> Setup:
    net = Recurrent("gru", 8, 48, 10)
    optimizer = SGD(net.parameters(), lr=0.3 / _TINY, momentum=0.9)
    setup = classification(net, optimizer, Digits(seed, "rows"))
    setup.loss = partial(_autocast, net, _TINY * scale)

    def unscale() -> None:
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale

    if scale != 1.0:
        setup.before_step = unscale
    return setup


def _scaled(net: nn.Module, data: Digits, scale: float) -> Setup:
    setup = classification(net, Adam(net.parameters(), lr=1e-3), data)
    loss = setup.loss
    setup.loss = lambda batch: scale * loss(batch)
    return setup


def _small(seed: int) -> Setup:
    return _scaled(mlp(deep(4)), Digits(seed), 1e-5)


def _single(seed: int) -> Setup:
    net = mlp(deep(4))
    setup = classification(net, SGD(net.parameters(), lr=0.02 / _SMALL, momentum=0.9), Digits(seed))
    loss = setup.loss
    setup.loss = lambda batch: _SMALL * loss(batch)
    return setup


def _large(seed: int) -> Setup:
    return _scaled(cnn(), Digits(seed, "image"), 1e5)


PROGRAMS: tuple[Program, ...] = (
    _UNDERFLOW.failing(
        "mlp_half_without_scaling",
        _half_mlp,
        _STEPS,
        DIGITS,
        (Pathology.UNDERFLOW,),
        "Half precision with a small loss: most gradients are zero only because of it.",
    ),
    _UNDERFLOW.healthy(
        "mlp_loss_/1e5_adam", _small, _STEPS, DIGITS, "A tiny loss under Adam, in float32."
    ),
    _UNDERFLOW.healthy(
        "mlp_loss_/1e5_sgd", _single, _STEPS, DIGITS, "The failing one, in float32."
    ),
    _UNDERFLOW_RECURRENT.failing(
        "gru_half_without_scaling",
        partial(_half_gru, 1.0),
        _STEPS,
        DIGITS,
        (Pathology.UNDERFLOW,),
        "A GRU in half precision, likewise.",
    ),
    _UNDERFLOW_RECURRENT.healthy(
        "gru_half_with_scaling",
        partial(_half_gru, 2.0**20),
        _STEPS,
        DIGITS,
        "The same with its loss scaled up and its gradients scaled down.",
    ),
    _UNDERFLOW_RECURRENT.healthy(
        "cnn_loss_x1e5_adam", _large, _STEPS, DIGITS, "A huge loss under Adam, in float32."
    ),
)
