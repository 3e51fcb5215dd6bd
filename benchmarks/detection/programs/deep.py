"""Depth: gradients that vanish on their way to the first layers, or explode."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam

from benchmarks.detection.nets import Residual, Transformer, cnn, deep, mlp, with_weights
from benchmarks.detection.programs.family import Family
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import DIGITS, Batch, Digits, Form, classification
from lightning_gradguard.diagnose import Pathology

_SIGMOID = Family("deep_sigmoid")
_TANH = Family("deep_tanh")
_CNN = Family("deep_cnn")
_INIT = Family("init_explosion")
_INIT_CNN = Family("init_explosion_cnn")

_EXPLOSION = (
    Pathology.EXPLODING,
    Pathology.DIVERGING,
    Pathology.NON_FINITE,
    Pathology.UPDATE_OUT_OF_RANGE,
)


def _train(net: nn.Module, lr: float, seed: int, form: Form = "vector") -> Setup:
    optimizer = SGD(net.parameters(), lr=lr, momentum=0.9)
    return classification(net, optimizer, Digits(seed, form))


def _sigmoid(seed: int) -> Setup:
    return _train(mlp(deep(12), nn.Sigmoid), 0.05, seed)


def _normalized(seed: int) -> Setup:
    return _train(mlp(deep(12), nn.ReLU, nn.BatchNorm1d), 0.02, seed)


def _residual(seed: int) -> Setup:
    blocks = [Residual(64) for _ in range(10)]
    return _train(nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 10)), 0.01, seed)


def _tanh(gain: float, seed: int) -> Setup:
    net = with_weights(mlp(deep(20), nn.Tanh), partial(nn.init.xavier_normal_, gain=gain))
    return _train(net, 0.01, seed)


def _transformer(seed: int) -> Setup:
    net = Transformer(blocks=4)
    return classification(net, Adam(net.parameters(), lr=1e-3), Digits(seed, "rows"))


def _sigmoid_cnn(seed: int) -> Setup:
    return _train(cnn([1, *[12] * 10], nn.Sigmoid), 0.05, seed, "image")


def _normalized_cnn(seed: int) -> Setup:
    return _train(cnn([1, *[12] * 10], nn.ReLU, nn.BatchNorm2d), 0.05, seed, "image")


def _wide_init(seed: int) -> Setup:
    net = with_weights(mlp(deep(8)), partial(nn.init.normal_, std=1.2))
    return _train(net, 0.01, seed)


def _wide_init_cnn(seed: int) -> Setup:
    net = with_weights(cnn([1, 16, 16, 16, 16]), nn.init.normal_)
    return _train(net, 0.01, seed, "image")


def _summed(net: nn.Module, lr: float, form: Form, seed: int) -> Setup:
    setup = _train(net, lr, seed, form)

    def loss(batch: Batch) -> torch.Tensor:
        return cross_entropy(net(batch[0]), batch[1], reduction="sum")

    setup.loss = loss
    return setup


def _summed_mlp(seed: int) -> Setup:
    return _summed(with_weights(mlp(deep(8)), nn.init.kaiming_normal_), 1e-4, "vector", seed)


def _summed_cnn(seed: int) -> Setup:
    net = with_weights(cnn([1, 16, 16, 16, 16]), nn.init.kaiming_normal_)
    return _summed(net, 3e-4, "image", seed)


def _first(layers: int, stride: int = 2) -> tuple[str, ...]:
    """Paths of the first layers of a sequential network with everything behind each."""
    return tuple(str(place) for place in range(layers * stride))


PROGRAMS: tuple[Program, ...] = (
    _SIGMOID.failing(
        "mlp_12_sigmoid",
        _sigmoid,
        800,
        DIGITS,
        (Pathology.VANISHING_IN_DEPTH,),
        "A 12-layer sigmoid MLP.",
        layers=_first(6),
    ),
    _SIGMOID.healthy(
        "mlp_12_batch_norm", _normalized, 800, DIGITS, "12 layers with ReLU and batch norm."
    ),
    _SIGMOID.healthy("mlp_12_residual", _residual, 800, DIGITS, "12 layers with skip connections."),
    _TANH.failing(
        "mlp_20_tanh_small",
        partial(_tanh, 0.4),
        800,
        DIGITS,
        (Pathology.VANISHING_IN_DEPTH,),
        "A 20-layer tanh MLP whose initial weights are 0.4 of Xavier's.",
        layers=_first(10),
    ),
    _TANH.healthy(
        "mlp_20_tanh_xavier", partial(_tanh, 1.0), 800, DIGITS, "The same with Xavier's own."
    ),
    _TANH.healthy(
        "transformer_4", _transformer, 800, DIGITS, "A transformer that normalizes first."
    ),
    _CNN.failing(
        "cnn_10_sigmoid",
        _sigmoid_cnn,
        600,
        DIGITS,
        (Pathology.VANISHING_IN_DEPTH,),
        "A CNN of 10 sigmoid layers.",
        layers=_first(5),
    ),
    _CNN.healthy(
        "cnn_10_batch_norm", _normalized_cnn, 600, DIGITS, "The same with ReLU and batch norm."
    ),
    _INIT.failing(
        "mlp_8_normal_1.2",
        _wide_init,
        800,
        DIGITS,
        _EXPLOSION,
        "A ReLU MLP whose initial weights have a deviation of 1.2.",
    ),
    _INIT.healthy(
        "mlp_8_he_summed", _summed_mlp, 800, DIGITS, "He's initial weights and a summed loss."
    ),
    _INIT_CNN.failing(
        "cnn_4_normal_1",
        _wide_init_cnn,
        800,
        DIGITS,
        (*_EXPLOSION, Pathology.DEAD_UNITS),  # after twenty steps hardly a unit is alive
        "A CNN whose initial weights have a deviation of 1.",
    ),
    _INIT_CNN.healthy(
        "cnn_4_he_summed", _summed_cnn, 800, DIGITS, "He's initial weights and a summed loss."
    ),
)
