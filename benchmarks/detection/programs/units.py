"""Units that are dead or saturated, and units that only look like it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu
from torch.optim import SGD, Adam
from typing_extensions import override

from benchmarks.detection.nets import Calls, cnn, deep, mlp, with_weights
from benchmarks.detection.programs.family import Family, spoiled
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import DIGITS, Batch, Digits, classification
from lightning_gradguard.diagnose import Pathology

_DEAD = Family("dead_bias")
_DEAD_CNN = Family("dead_cnn")
_SATURATED = Family("saturated_tanh")
_SATURATED_SIGMOID = Family("saturated_sigmoid")

_STEPS = 800


class FunctionalCnn(nn.Module):
    """Three convolutions whose activations are functions, not modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(128, 10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        features = relu(self.third(relu(self.second(relu(self.first(images))))))
        head: Tensor = self.head(adaptive_avg_pool2d(features, 2).flatten(1))
        return head


def _biased(value: float, seed: int) -> Setup:
    net = with_weights(mlp(deep(4)), nn.init.kaiming_normal_)
    with torch.no_grad():
        net.get_parameter("2.bias").fill_(value)
    return classification(net, SGD(net.parameters(), lr=0.05, momentum=0.9), Digits(seed))


def _shifted_cnn(value: float, seed: int) -> Setup:
    net = FunctionalCnn()
    with torch.no_grad():
        net.get_parameter("second.bias").sub_(value)
    return classification(net, Adam(net.parameters(), lr=1e-3), Digits(seed, "image"))


def _strongest(features: Tensor) -> Tensor:
    """Keeps one channel in four at each pixel."""
    least = torch.topk(features, features.shape[1] // 4, dim=1).values[:, -1:]
    return torch.where(features >= least, features, 0.0)


def _top_k(seed: int) -> Setup:
    first, activation, *others = cnn()
    net = nn.Sequential(first, activation, Calls(_strongest), *others)
    return classification(net, Adam(net.parameters(), lr=2e-3), Digits(seed, "image"))


def _bright(batch: Batch) -> Batch:
    return 1000 * batch[0], batch[1]


def _raw_inputs(seed: int) -> Setup:
    """Inputs up to a thousand: the first layer sees only their signs."""
    net = with_weights(mlp(deep(4), nn.Tanh), nn.init.xavier_normal_)
    setup = classification(net, SGD(net.parameters(), lr=0.05, momentum=0.9), Digits(seed))
    setup.batch = spoiled(setup.batch, lambda step: True, _bright)
    return setup


def _tanh(seed: int) -> Setup:
    net = with_weights(mlp(deep(4), nn.Tanh), nn.init.xavier_normal_)
    return classification(net, SGD(net.parameters(), lr=0.05, momentum=0.9), Digits(seed))


def _sigmoid(std: float, seed: int) -> Setup:
    net = with_weights(mlp(deep(3), nn.Sigmoid), partial(nn.init.normal_, std=std))
    return classification(net, Adam(net.parameters(), lr=3e-3), Digits(seed))


PROGRAMS: tuple[Program, ...] = (
    _DEAD.failing(
        "mlp_bias_-6",
        partial(_biased, -6.0),
        _STEPS,
        DIGITS,
        (Pathology.DEAD_UNITS,),
        "Biases of -6 before a ReLU, which no input overcomes.",
        layers=("2", "3"),
    ),
    _DEAD.healthy(
        "mlp_sparse", partial(_biased, -0.5), _STEPS, DIGITS, "Few units are active at a time."
    ),
    _DEAD_CNN.failing(
        "cnn_shifted_functional",
        partial(_shifted_cnn, 5.0),
        _STEPS,
        DIGITS,
        (Pathology.DEAD_UNITS,),
        "A convolution shifted below zero, before a ReLU that is no module.",
        layers=("second",),
    ),
    _DEAD_CNN.healthy(
        "cnn_top_k", _top_k, _STEPS, DIGITS, "Three of four channels are zero at every pixel."
    ),
    _DEAD_CNN.healthy(
        "cnn_functional",
        partial(_shifted_cnn, 0.1),
        _STEPS,
        DIGITS,
        "The same network, shifted by a little.",
    ),
    _SATURATED.failing(
        "mlp_tanh_inputs_x1000",
        _raw_inputs,
        _STEPS,
        DIGITS,
        (Pathology.SATURATED,),
        "A tanh MLP on inputs up to a thousand.",
        layers=("0", "1", "2", "3", "4", "5"),
    ),
    _SATURATED.healthy("mlp_tanh", _tanh, _STEPS, DIGITS, "The same on inputs up to one."),
    _SATURATED_SIGMOID.failing(
        "mlp_sigmoid_normal_10",
        partial(_sigmoid, 10.0),
        _STEPS,
        DIGITS,
        (Pathology.SATURATED,),
        "A sigmoid MLP whose initial weights have a deviation of 10.",
        layers=("0", "1", "2", "3"),
    ),
    _SATURATED_SIGMOID.healthy(
        "mlp_sigmoid", partial(_sigmoid, 0.2), _STEPS, DIGITS, "The same with weights of 0.2."
    ),
)
