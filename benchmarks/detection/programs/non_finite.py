"""NaN and Inf, from the data, from a layer, from the backward pass; and what is merely far off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from typing_extensions import override

from benchmarks.detection.nets import Calls, Recurrent, cnn, deep, mlp
from benchmarks.detection.programs.family import Family, spoiled
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

_INPUT = Family("non_finite_input")
_BACKWARD = Family("non_finite_backward")
_LABEL = Family("non_finite_label")
_FORWARD = Family("non_finite_forward")

_STEPS = 800
_ONSET = 300


def _with_row(inputs: Tensor, value: float) -> Tensor:
    changed = inputs.clone()
    changed[0] = value
    return changed


def _faulty_row(value: float, seed: int) -> Setup:
    net = mlp(deep(4))
    setup = classification(net, SGD(net.parameters(), lr=0.05, momentum=0.9), Digits(seed))

    def spoil(batch: Batch) -> Batch:
        return _with_row(batch[0], value), batch[1]

    setup.batch = spoiled(setup.batch, lambda step: step == _ONSET, spoil)
    return setup


def _outlier(seed: int) -> Setup:
    net = mlp(deep(4))
    setup = classification(net, Adam(net.parameters(), lr=1e-3), Digits(seed))
    setup.batch = spoiled(
        setup.batch, lambda step: step == _ONSET, lambda batch: (100 * batch[0], batch[1])
    )
    return setup


class Contrast(nn.Module):
    """Root mean square of the weighted pixels of each group of four.

    Args:
        floor: What is added inside the root, whose slope at zero is infinite.
    """

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(64))
        self._floor = floor

    @override
    def forward(self, pixels: Tensor) -> Tensor:
        groups = (self.gain * pixels).unflatten(-1, (16, 4))
        contrast: Tensor = (groups.square().mean(-1) + self._floor).sqrt()
        return contrast


def _contrast(floor: float, seed: int) -> Setup:
    """No group of pixels is all black until clean images come in."""
    net = nn.Sequential(Contrast(floor), *mlp([16, 64, 64, 10]))
    setup = classification(net, Adam(net.parameters(), lr=2e-3), Digits(seed))
    setup.batch = spoiled(
        setup.batch, lambda step: step < _ONSET, lambda batch: (batch[0] + 0.1, batch[1])
    )
    return setup


def _faulty_target(value: float, lr: float, seed: int) -> Setup:
    net = Recurrent("gru", 1, 32, 1)
    data = Sequences(seed, recent_sum(20, 5))
    setup = regression(net, Adam(net.parameters(), lr=lr), data)

    def spoil(batch: Batch) -> Batch:
        return batch[0], _with_row(batch[1], value)

    setup.batch = spoiled(setup.batch, lambda step: step == _ONSET, spoil)
    return setup


def _logged(log: Callable[[Tensor], Tensor], seed: int) -> Setup:
    """Intensities are positive until images with a black background come in."""
    net = nn.Sequential(Calls(log), *cnn())
    setup = classification(net, Adam(net.parameters(), lr=2e-3), Digits(seed, "image"))
    setup.batch = spoiled(
        setup.batch,
        lambda step: step < _ONSET,
        lambda batch: (batch[0] + 0.1, batch[1]),
    )
    return setup


PROGRAMS: tuple[Program, ...] = (
    _INPUT.failing(
        "mlp_nan_in_batch",
        partial(_faulty_row, torch.nan),
        _STEPS,
        DIGITS,
        (Pathology.NON_FINITE,),
        "One example of one batch is NaN.",
        onset=_ONSET,
    ),
    _INPUT.healthy(
        "mlp_outlier_batch", _outlier, _STEPS, DIGITS, "One batch is a hundred times too large."
    ),
    _BACKWARD.failing(
        "mlp_root_of_zero",
        partial(_contrast, 0.0),
        _STEPS,
        DIGITS,
        (Pathology.NON_FINITE,),
        "A square root of zero: its value is finite, its gradient is not.",
        layers=("0",),
        onset=_ONSET,
    ),
    _BACKWARD.healthy(
        "mlp_root_of_more",
        partial(_contrast, 1e-6),
        _STEPS,
        DIGITS,
        "The same with a little added inside.",
    ),
    _LABEL.failing(
        "gru_infinite_target",
        partial(_faulty_target, torch.inf, 3e-3),
        _STEPS,
        RECENT_SUM,
        (Pathology.NON_FINITE,),
        "One target of one batch is infinite.",
        onset=_ONSET,
    ),
    _LABEL.healthy(
        "gru_outlier_target",
        partial(_faulty_target, 30.0, 3e-3),
        _STEPS,
        RECENT_SUM,
        "One target of one batch is thirty deviations off.",
    ),
    _FORWARD.failing(
        "cnn_log_of_zero",
        partial(_logged, torch.log),
        _STEPS,
        DIGITS,
        (Pathology.NON_FINITE,),
        "A logarithm inside the network, and then the first black pixels.",
        layers=("0",),
        onset=_ONSET,
    ),
    _FORWARD.healthy(
        "cnn_log_of_more",
        partial(_logged, torch.log1p),
        _STEPS,
        DIGITS,
        "The same with one added inside.",
    ),
)
