"""Recurrent networks: a memory that is too short, and states that explode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam

from benchmarks.detection.nets import Recurrent, with_memory
from benchmarks.detection.programs.family import Family
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import (
    ADDING,
    DIGITS_IN_TIME,
    ORDER,
    RECENT_SUM,
    Digits,
    MakeBatch,
    Sequences,
    adding,
    classification,
    recent_sum,
    regression,
    temporal_order,
)
from lightning_gradguard.diagnose import Pathology

_ADDING = Family("recurrent_adding")
_ADDING_200 = Family("recurrent_adding_200")
_ORDER = Family("recurrent_order")
_EXPLOSION = Family("recurrent_explosion")
_EXPLOSION_RELU = Family("recurrent_explosion_relu")


def _regress(
    kind: str, make: MakeBatch, inputs: int, hidden: int, gain: float | None, lr: float, seed: int
) -> Setup:
    net = Recurrent(kind, inputs, hidden, 1)
    if gain is not None:
        with_memory(net, partial(nn.init.orthogonal_, gain=gain))
    return regression(net, Adam(net.parameters(), lr=lr), Sequences(seed, make))


def _order(kind: str, timesteps: int, lr: float, seed: int) -> Setup:
    net = Recurrent(kind, 6, 48, 4)
    data = Sequences(seed, temporal_order(timesteps))
    return classification(net, Adam(net.parameters(), lr=lr), data)


def _tanh(gain: float) -> Recurrent:
    return with_memory(Recurrent("tanh", 1, 48, 10), partial(nn.init.orthogonal_, gain=gain))


def _chaotic(optimizer: type[SGD | Adam], lr: float, seed: int) -> Setup:
    net = _tanh(3.0)
    return classification(net, optimizer(net.parameters(), lr=lr), Digits(seed, "pixels"))


def _clipped_pixels(seed: int) -> Setup:
    net = _tanh(1.0)
    setup = classification(net, SGD(net.parameters(), lr=0.1), Digits(seed, "pixels"))
    setup.before_step = clipped(net, 1.0)
    return setup


def _grow(weight: Tensor) -> None:
    nn.init.eye_(weight).mul_(1.3)


def _growing(seed: int) -> Setup:
    net = with_memory(Recurrent("relu", 1, 48, 10), _grow)
    return classification(net, SGD(net.parameters(), lr=0.01), Digits(seed, "pixels"))


def _identity(lr: float, max_norm: float, seed: int) -> Setup:
    net = with_memory(Recurrent("relu", 1, 48, 1), nn.init.eye_)
    data = Sequences(seed, recent_sum(60, 5))
    setup = regression(net, Adam(net.parameters(), lr=lr), data)
    setup.before_step = clipped(net, max_norm)
    return setup


def clipped(net: nn.Module, max_norm: float) -> Callable[[], None]:
    """Clips as a user would."""

    def clip() -> None:
        clip_grad_norm_(net.parameters(), max_norm)

    return clip


PROGRAMS: tuple[Program, ...] = (
    _ADDING.failing(
        "adding_60_tanh",
        partial(_regress, "tanh", adding(60), 2, 48, 0.5, 1e-3),
        1000,
        ADDING,
        (Pathology.VANISHING_IN_TIME,),
        "A tanh RNN with a recurrent gain of 0.5 on the adding problem, 60 steps.",
        layers=("rnn",),
    ),
    _ADDING.healthy(
        "recent_3_of_60_tanh",
        partial(_regress, "tanh", recent_sum(60, 3), 1, 48, 0.5, 1e-3),
        1000,
        RECENT_SUM,
        "The same network, where only the last 3 inputs count.",
    ),
    _ADDING_200.failing(
        "adding_200_tanh",
        partial(_regress, "tanh", adding(200), 2, 32, None, 1e-3),
        600,
        ADDING,
        (Pathology.VANISHING_IN_TIME,),
        "A tanh RNN as torch initializes it on the adding problem, 200 steps.",
        layers=("rnn",),
    ),
    _ADDING_200.healthy(
        "recent_5_of_200_tanh",
        partial(_regress, "tanh", recent_sum(200, 5), 1, 32, None, 2e-3),
        600,
        RECENT_SUM,
        "The same network, where only the last 5 inputs count.",
    ),
    _ORDER.failing(
        "order_100_tanh",
        partial(_order, "tanh", 100, 1e-3),
        1000,
        ORDER,
        (Pathology.VANISHING_IN_TIME,),
        "A tanh RNN as torch initializes it on temporal order, 100 steps.",
        layers=("rnn",),
    ),
    _ORDER.healthy(
        "order_20_gru",
        partial(_order, "gru", 20, 3e-3),
        1500,
        ORDER,
        "A GRU on 20 steps, whose memory is short at first and grows with training.",
    ),
    _EXPLOSION.failing(
        "pixels_tanh_gain_3",
        partial(_chaotic, Adam, 1e-3),
        800,
        DIGITS_IN_TIME,
        (Pathology.EXPLODING,),
        "A tanh RNN with a recurrent gain of 3 and no clipping.",
        layers=("rnn",),
    ),
    _EXPLOSION.failing(
        "pixels_tanh_gain_3_sgd",
        partial(_chaotic, SGD, 0.1),
        800,
        DIGITS_IN_TIME,
        # The first step is so large that no gradient comes through the units ever after.
        (Pathology.EXPLODING, Pathology.SATURATED),
        "The same under SGD, whose first step saturates every unit.",
        layers=("rnn",),
    ),
    _EXPLOSION.healthy(
        "pixels_tanh_clipped",
        _clipped_pixels,
        1200,
        DIGITS_IN_TIME,
        "The same with a gain of 1, clipped at every spike.",
    ),
    _EXPLOSION_RELU.failing(
        "pixels_relu_growing",
        _growing,
        800,
        DIGITS_IN_TIME,
        (
            Pathology.EXPLODING,
            Pathology.NON_FINITE,
            Pathology.DIVERGING,
            Pathology.UPDATE_OUT_OF_RANGE,
        ),
        "A ReLU RNN whose states grow by 1.3 per step, without clipping.",
        layers=("rnn",),
    ),
    _EXPLOSION_RELU.healthy(
        "recent_5_of_60_identity_clipped",
        partial(_identity, 1e-3, 1.0),
        1000,
        RECENT_SUM,
        "An IRNN as published (Le et al. 2015): the identity itself, with clipping.",
    ),
)
