"""Losses that go the wrong way or nowhere, and those that only have far to go."""

from __future__ import annotations

from functools import partial

import torch
from torch.optim import SGD, Adam

from benchmarks.detection.nets import Recurrent, cnn, deep, mlp
from benchmarks.detection.programs.family import Family, spoiled
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import (
    DIGITS,
    DIGITS_IN_TIME,
    RECENT_SUM,
    Batch,
    Digits,
    Sequences,
    Target,
    classification,
    recent_sum,
    regression,
)
from lightning_gradguard.diagnose import Pathology

_SIGN = Family("wrong_sign")
_NEGATED = Family("negated_loss")
_SHUFFLED = Family("shuffled_labels")
_UNRELATED = Family("unrelated_target")

_STEPS = 1000
# A third of the labels are random: three in ten examples stay wrong whatever is learned, but not
# on clean data.
_NOISE = 1 / 3


def _mlp(lr: float, maximize: bool, seed: int) -> Setup:
    net = mlp(deep(4))
    optimizer = SGD(net.parameters(), lr=lr, momentum=0.9, maximize=maximize)
    return classification(net, optimizer, Digits(seed))


def _rows(kind: str, lr: float, seed: int) -> Setup:
    net = Recurrent(kind, 8, 48, 10)
    return classification(net, Adam(net.parameters(), lr=lr), Digits(seed, "rows"))


def _negated(seed: int) -> Setup:
    setup = _rows("gru", 3e-3, seed)
    loss = setup.loss
    setup.loss = lambda batch: -loss(batch)
    return setup


def _shuffle(batch: Batch) -> Batch:
    return batch[0], batch[1].roll(1)


def _shuffled(seed: int) -> Setup:
    net = cnn()
    setup = classification(net, Adam(net.parameters(), lr=1e-3), Digits(seed, "image"))
    setup.batch = spoiled(setup.batch, lambda step: True, _shuffle)
    return setup


def _noisy(seed: int) -> Setup:
    net = cnn()
    setup = classification(net, Adam(net.parameters(), lr=1e-3), Digits(seed, "image"))
    generator = torch.Generator().manual_seed(seed)

    def spoil(batch: Batch) -> Batch:
        images, labels = batch
        wrong = torch.rand(labels.shape, generator=generator) < _NOISE
        other = torch.randint(10, labels.shape, generator=generator)
        return images, torch.where(wrong, other, labels)

    setup.batch = spoiled(setup.batch, lambda step: True, spoil)
    return setup


def _unrelated(size: int, generator: torch.Generator) -> Batch:
    return (
        torch.rand(size, 20, 1, generator=generator) - 0.5,
        torch.randn(size, generator=generator),
    )


def _barely_related(size: int, generator: torch.Generator) -> Batch:
    """A fifth of the variance can be explained, and the rest is noise."""
    inputs, sums = recent_sum(20, 5)(size, generator)
    return inputs, sums + 2 * torch.randn(size, generator=generator)


def _sums(make: str, seed: int) -> Setup:
    net = Recurrent("gru", 1, 32, 1)
    data = Sequences(seed, _unrelated if make == "unrelated" else _barely_related)
    return regression(net, Adam(net.parameters(), lr=3e-3), data)


_GROWS = (Pathology.DIVERGING, Pathology.EXPLODING, Pathology.NON_FINITE)
PROGRAMS: tuple[Program, ...] = (
    _SIGN.failing(
        "mlp_maximizes",
        partial(_mlp, 0.005, True),
        _STEPS,
        DIGITS,
        (*_GROWS, Pathology.UPDATE_OUT_OF_RANGE),
        "An optimizer that climbs the loss.",
    ),
    _SIGN.healthy(
        "mlp_converged",
        partial(_mlp, 0.05, False),
        2000,
        DIGITS,
        "Trained long after it has converged.",
    ),
    _NEGATED.failing(
        "gru_negated_loss",
        _negated,
        _STEPS,
        DIGITS_IN_TIME,
        _GROWS,
        "A loss with the wrong sign, which falls without bound.",
    ),
    _NEGATED.healthy("gru_rows", partial(_rows, "gru", 3e-3), _STEPS, DIGITS, "The right sign."),
    _SHUFFLED.failing(
        "cnn_shuffled_labels",
        _shuffled,
        _STEPS,
        DIGITS,
        (Pathology.STAGNATING,),
        "Labels that belong to other examples of the batch.",
    ),
    _SHUFFLED.healthy(
        "cnn_noisy_labels", _noisy, _STEPS, DIGITS, "A third of the labels are random."
    ),
    _UNRELATED.failing(
        "gru_unrelated_target",
        partial(_sums, "unrelated"),
        _STEPS,
        RECENT_SUM,
        (Pathology.STAGNATING,),
        "A target that does not depend on the input.",
    ),
    _UNRELATED.healthy(
        "gru_noisy_target",
        partial(_sums, "noisy"),
        _STEPS,
        # The noise has a variance of 4, and the score is measured on noisy targets, too.
        Target(4.6, higher_is_better=False),
        "A target of which a fifth can be explained.",
    ),
)
