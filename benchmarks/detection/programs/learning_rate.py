"""Learning rates: far too large, far too small, too large later on, and schedules that work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.nn.functional import mse_loss, one_hot
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LambdaLR,
    OneCycleLR,
    StepLR,
)

from benchmarks.detection.nets import Recurrent, Transformer, cnn, deep, mlp, with_weights
from benchmarks.detection.programs.family import Family, scheduled, spoiled
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import (
    DIGITS,
    RECENT_SUM,
    Batch,
    Digits,
    Sequences,
    classification,
    recent_sum,
    regression,
)
from lightning_gradguard.diagnose import Pathology

_LARGE = Family("learning_rate")
_LARGE_ADAM = Family("learning_rate_adam")
_SMALL = Family("dead_learning_rate")
_LATE = Family("late_divergence")
_LATE_DATA = Family("late_corruption")

_STEPS = 1000
_ONSET = 500
_CORRUPT = 400

_TOO_FAR = (
    Pathology.DIVERGING,
    Pathology.EXPLODING,
    Pathology.UPDATE_OUT_OF_RANGE,
    Pathology.OSCILLATING,
    Pathology.NON_FINITE,
    Pathology.LOSS_SPIKE,
)


def _sgd(lr: float, seed: int) -> Setup:
    net = mlp(deep(4))
    return classification(net, SGD(net.parameters(), lr=lr, momentum=0.9), Digits(seed))


def _shaped(lr: float, shape: Callable[[int], float], seed: int) -> Setup:
    setup = _sgd(lr, seed)
    return scheduled(setup, LambdaLR(setup.optimizer, shape))


def _warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 200)


def _jump(step: int) -> float:
    return 300.0 if step >= _ONSET else 1.0


def _steps_down(seed: int) -> Setup:
    setup = _sgd(0.05, seed)
    return scheduled(setup, StepLR(setup.optimizer, 250, gamma=0.1))


def _adam(lr: float, seed: int) -> Setup:
    net = Transformer()
    return classification(net, Adam(net.parameters(), lr=lr), Digits(seed, "rows"))


def _one_cycle(seed: int) -> Setup:
    setup = _adam(1e-3, seed)
    return scheduled(setup, OneCycleLR(setup.optimizer, max_lr=5e-3, total_steps=_STEPS))


def _restarts(seed: int) -> Setup:
    net = cnn()
    setup = classification(net, Adam(net.parameters(), lr=3e-3), Digits(seed, "image"))
    return scheduled(setup, CosineAnnealingWarmRestarts(setup.optimizer, T_0=250))


def _plateau(seed: int) -> Setup:
    """Small initial weights and a squared error: a saddle that is left after some hundred steps."""
    net = with_weights(mlp(deep(4), nn.Tanh), partial(nn.init.xavier_normal_, gain=0.15))
    setup = classification(net, SGD(net.parameters(), lr=0.2, momentum=0.9), Digits(seed))
    setup.loss = lambda batch: mse_loss(net(batch[0]), one_hot(batch[1], 10).float())
    return setup


def _sums(seed: int) -> Setup:
    net = Recurrent("gru", 1, 32, 1)
    data = Sequences(seed, recent_sum(20, 5))
    return regression(net, Adam(net.parameters(), lr=3e-3), data)


def _thousandfold(batch: Batch) -> Batch:
    return batch[0], 1e3 * batch[1]


def _corrupted(seed: int) -> Setup:
    setup = _sums(seed)
    setup.batch = spoiled(setup.batch, lambda step: step >= _CORRUPT, _thousandfold)
    return setup


PROGRAMS: tuple[Program, ...] = (
    _LARGE.failing(
        "mlp_sgd_lr_x1000",
        partial(_sgd, 50.0),
        _STEPS,
        DIGITS,
        (*_TOO_FAR, Pathology.DEAD_UNITS),  # after five steps no unit of the first layer is alive
        "An MLP with a thousand times the learning rate that works.",
    ),
    _LARGE.healthy(
        "mlp_sgd_warm_up",
        partial(_shaped, 0.1, _warm_up),
        _STEPS,
        DIGITS,
        "The same network, its learning rate warmed up over 200 steps.",
    ),
    _LARGE.healthy(
        "mlp_sgd_steps_down", _steps_down, _STEPS, DIGITS, "A tenth of the rate every 250 steps."
    ),
    _LARGE_ADAM.failing(
        "transformer_adam_lr_x1000",
        partial(_adam, 1.0),
        _STEPS,
        DIGITS,
        _TOO_FAR,
        "A transformer under Adam with a thousand times the learning rate that works.",
    ),
    _LARGE_ADAM.healthy(
        "transformer_one_cycle", _one_cycle, _STEPS, DIGITS, "One cycle up to 5 times that rate."
    ),
    _LARGE_ADAM.healthy(
        "cnn_warm_restarts", _restarts, _STEPS, DIGITS, "A cosine that restarts every 250 steps."
    ),
    _SMALL.failing(
        "mlp_sgd_lr_/10000",
        partial(_sgd, 5e-6),
        _STEPS,
        DIGITS,
        (Pathology.STAGNATING, Pathology.UPDATE_OUT_OF_RANGE),
        "An MLP with a ten thousandth of the learning rate that works.",
    ),
    _SMALL.healthy(
        "mlp_sgd_slow", partial(_sgd, 3e-3), 1500, DIGITS, "A slow learner that gets there."
    ),
    _LATE.failing(
        "mlp_lr_jumps",
        partial(_shaped, 0.05, _jump),
        _STEPS,
        DIGITS,
        _TOO_FAR,
        "A schedule that multiplies the learning rate by 300 in the middle of the run.",
        onset=_ONSET,
    ),
    _LATE.healthy(
        "mlp_plateau_then_drop", _plateau, 1500, DIGITS, "A long plateau, then a sudden drop."
    ),
    _LATE_DATA.failing(
        "gru_targets_x1000",
        _corrupted,
        _STEPS,
        RECENT_SUM,
        (Pathology.DIVERGING, Pathology.LOSS_SPIKE, Pathology.EXPLODING),
        "Targets that are a thousand times too large from step 400 on.",
        onset=_CORRUPT,
    ),
    _LATE_DATA.healthy(
        "gru_converged",
        _sums,
        2000,
        RECENT_SUM,
        "The same without it, trained long after it has converged.",
    ),
)
