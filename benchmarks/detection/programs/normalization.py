"""Batch norm in the wrong mode, and batch norm that has little to do."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD

from benchmarks.detection.nets import deep, mlp
from benchmarks.detection.programs.family import Family
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import DIGITS, Digits, classification
from lightning_gradguard.diagnose import Pathology

_MODE = Family("batch_norm_mode")

_DEPTH = 10
_STEPS = 800


def _deep(training: bool, seed: int) -> Setup:
    """With the running statistics it starts from, batch norm changes nothing."""
    net = mlp(deep(_DEPTH), nn.Sigmoid, nn.BatchNorm1d)
    net.train(training)
    return classification(net, SGD(net.parameters(), lr=0.05, momentum=0.9), Digits(seed))


def _left_in_eval(seed: int) -> Setup:
    return _deep(False, seed)


def _in_training(seed: int) -> Setup:
    return _deep(True, seed)


def _constant_pixels(seed: int) -> Setup:
    """Some pixels at the border are always black: their channels have no variance."""
    net = nn.Sequential(nn.BatchNorm1d(64), *mlp(deep(3)))
    return classification(net, SGD(net.parameters(), lr=0.05, momentum=0.9), Digits(seed))


PROGRAMS: tuple[Program, ...] = (
    _MODE.failing(
        "mlp_batch_norm_in_eval",
        _left_in_eval,
        _STEPS,
        DIGITS,
        (Pathology.VANISHING_IN_DEPTH,),
        "A deep sigmoid MLP whose batch norm is in evaluation mode during training.",
        layers=tuple(str(place) for place in range(_DEPTH // 2 * 3)),
    ),
    _MODE.healthy(
        "mlp_batch_norm_in_training", _in_training, _STEPS, DIGITS, "The same in training mode."
    ),
    _MODE.healthy(
        "mlp_constant_channels",
        _constant_pixels,
        _STEPS,
        DIGITS,
        "Batch norm of channels that never change.",
    ),
)
