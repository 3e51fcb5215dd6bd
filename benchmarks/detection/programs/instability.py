"""Losses that swing, or jump up once and for all, and those that are noisy or jump once."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CyclicLR

from benchmarks.detection.nets import MakeModule, Recurrent, deep, mlp
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

_OSCILLATING = Family("oscillating")
_OSCILLATING_RECURRENT = Family("oscillating_recurrent")
_SPIKE = Family("spike")
_SPIKE_RECURRENT = Family("spike_recurrent")

_STEPS = 1000
_ONSET = 400
_POISONED = range(_ONSET, _ONSET + 10)

_SPIKES = (
    Pathology.LOSS_SPIKE,
    Pathology.DIVERGING,
    Pathology.EXPLODING,
    Pathology.UPDATE_OUT_OF_RANGE,
)


def _mlp(lr: float, seed: int, momentum: float = 0.9, activation: MakeModule = nn.ReLU) -> Setup:
    net = mlp(deep(4), activation)
    optimizer = SGD(net.parameters(), lr=lr, momentum=momentum)
    return classification(net, optimizer, Digits(seed))


def _rows(kind: str, lr: float, seed: int) -> Setup:
    net = Recurrent(kind, 8, 48, 10)
    return classification(net, Adam(net.parameters(), lr=lr), Digits(seed, "rows"))


def _sorted(seed: int) -> Setup:
    """Fifty steps of each class in turn."""
    setup = _mlp(0.02, seed)
    data = Digits(seed)

    def batch(step: int) -> Batch:
        return data.batch_of_class(step // 50 % 10)

    setup.batch = batch
    return setup


def _cyclic(seed: int) -> Setup:
    setup = _rows("gru", 1e-3, seed)
    # The budget ends at a peak.
    cycle = CyclicLR(setup.optimizer, 1e-3, 1.0, step_size_up=50, cycle_momentum=False)
    return scheduled(setup, cycle)


def _small_batches(seed: int) -> Setup:
    net = mlp(deep(4))
    return classification(net, SGD(net.parameters(), lr=0.03), Digits(seed, batch_size=4))


def _far_off(batch: Batch) -> Batch:
    return 100 * batch[0].flip(-1), batch[1].roll(1)


def _poisoned(seed: int) -> Setup:
    setup = _mlp(0.05, seed)
    setup.batch = spoiled(setup.batch, lambda step: step in _POISONED, _far_off)
    return setup


def _recent(lr: float, momentum: float, seed: int) -> Setup:
    net = Recurrent("gru", 1, 32, 1)
    optimizer = SGD(net.parameters(), lr=lr, momentum=momentum)
    return regression(net, optimizer, Sequences(seed, recent_sum(20, 5)))


def _far_targets(batch: Batch) -> Batch:
    return batch[0], 300 * batch[1].abs()


def _poisoned_sums(seed: int) -> Setup:
    setup = _recent(0.05, 0.9, seed)
    setup.batch = spoiled(setup.batch, lambda step: step in _POISONED, _far_targets)
    return setup


def _mislabeled(seed: int) -> Setup:
    setup = _mlp(0.02, seed)
    setup.batch = spoiled(
        setup.batch, lambda step: step == _ONSET, lambda batch: (batch[0], batch[1].roll(1))
    )
    return setup


def _outlier_targets(seed: int) -> Setup:
    setup = _recent(0.02, 0.9, seed)
    setup.batch = spoiled(
        setup.batch, lambda step: step == _ONSET, lambda batch: (batch[0], 10 * batch[1])
    )
    return setup


PROGRAMS: tuple[Program, ...] = (
    _OSCILLATING.failing(
        "mlp_sorted_classes",
        _sorted,
        _STEPS,
        DIGITS,
        (Pathology.OSCILLATING,),
        "Data that nobody shuffled: each class is learned over the ones before it.",
    ),
    _OSCILLATING.failing(
        "mlp_momentum_0.99",
        partial(_mlp, 0.1, momentum=0.99, activation=nn.Tanh),
        _STEPS,
        DIGITS,
        (
            Pathology.DIVERGING,
            Pathology.OSCILLATING,
            Pathology.EXPLODING,
            Pathology.UPDATE_OUT_OF_RANGE,
            Pathology.SATURATED,
        ),
        "A momentum of 0.99 that carries the weights past what has been learned.",
    ),
    _OSCILLATING.healthy(
        "mlp_batches_of_4", _small_batches, 1500, DIGITS, "Batches of 4: a loss that is all noise."
    ),
    _OSCILLATING_RECURRENT.failing(
        "gru_cyclic_lr",
        _cyclic,
        _STEPS,
        DIGITS,
        (Pathology.OSCILLATING,),
        "A cyclic learning rate whose peaks undo what was learned.",
    ),
    _OSCILLATING_RECURRENT.healthy(
        "lstm_rows", partial(_rows, "lstm", 3e-3), _STEPS, DIGITS, "An LSTM at a sane rate."
    ),
    _SPIKE.failing(
        "mlp_poisoned_batches",
        _poisoned,
        _STEPS,
        DIGITS,
        (*_SPIKES, Pathology.DEAD_UNITS),  # the batches leave hardly a unit alive
        "Ten poisoned batches at a large learning rate, from which nothing recovers.",
        onset=_ONSET,
    ),
    _SPIKE.healthy(
        "mlp_mislabeled_batch",
        _mislabeled,
        _STEPS,
        DIGITS,
        "One batch with labels that belong to other examples, which is soon forgotten.",
    ),
    _SPIKE_RECURRENT.failing(
        "gru_poisoned_targets",
        _poisoned_sums,
        _STEPS,
        RECENT_SUM,
        _SPIKES,
        "Ten batches with targets that are far off, from which nothing recovers.",
        onset=_ONSET,
    ),
    _SPIKE_RECURRENT.healthy(
        "gru_outlier_targets",
        _outlier_targets,
        _STEPS,
        RECENT_SUM,
        "One batch with targets ten times too large, which is soon forgotten.",
    ),
)
