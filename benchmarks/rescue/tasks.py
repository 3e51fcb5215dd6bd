"""What is learned in the rescue benchmark: batches from a generator, and a score.

Every score is higher for better, with a floor: what it is for a model that has learned nothing.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from benchmarks.detection.tasks import adding, temporal_order

Batch = tuple[Tensor, Tensor]

_TEST = 500
_CHARACTERS = 64


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        draw: Makes a batch; of the test set from a generator of its own.
        test: The batch that the score is taken of.
        loss: Of outputs and labels; soft labels are probabilities of the classes.
        score: Of outputs and labels, higher for better.
        floor: The score without any learning.
        classes: Number of classes, 0 for a regression.
    """

    draw: Callable[[torch.Generator], Batch]
    test: Batch
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    floor: float
    classes: int


@cache
def digits(form: str, batch_size: int) -> Task:
    """Scikit-learn's digits: ``"pixels"`` 64 steps of one, ``"rows"`` 8 of eight, ``"vector"``."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    # Plain values of Python, so that torch need not understand this version of NumPy.
    inputs = torch.tensor(pixels.tolist())[order]
    inputs = (inputs - inputs.mean()) / inputs.std()
    targets = torch.tensor(labels.tolist())[order]
    shape = {"pixels": (-1, 64, 1), "rows": (-1, 8, 8), "vector": (-1, 64)}[form]
    inputs = inputs.view(shape)
    train = 1347

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(train, (batch_size,), generator=generator)
        return inputs[chosen], targets[chosen]

    return Task(draw, (inputs[train:], targets[train:]), cross_entropy, _accuracy, 0.1, 10)


@cache
def characters(timesteps: int, batch_size: int) -> Task:
    """The next character of source code, from the standard library of this Python.

    Comes with every Python: the module ``ast`` and, as test, its last tenth.
    """
    from pathlib import Path

    text = Path(ast.__file__).read_text(encoding="utf-8")
    common = sorted(set(text), key=lambda c: -text.count(c))[: _CHARACTERS - 1]
    number = {character: index for index, character in enumerate(common)}
    codes = torch.tensor([number.get(character, _CHARACTERS - 1) for character in text])
    train, test = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
    # Knowing only how often each character comes; in nats.
    shares = torch.bincount(test, minlength=_CHARACTERS).double() / len(test)
    entropy = float(-(shares * shares.clamp_min(1e-12).log()).sum())

    def cut(source: Tensor, starts_B: Tensor) -> Batch:
        windows_BT = source[starts_B[:, None] + torch.arange(timesteps + 1)]
        return one_hot(windows_BT[:, :-1], _CHARACTERS).float(), windows_BT[:, 1:]

    def draw(generator: torch.Generator) -> Batch:
        starts_B = torch.randint(len(train) - timesteps, (batch_size,), generator=generator)
        return cut(train, starts_B)

    def score(outputs_BTC: Tensor, labels_BT: Tensor) -> float:
        loss = float(cross_entropy(outputs_BTC.flatten(0, 1), labels_BT.flatten()))
        return 1.0 - loss / entropy

    def loss(outputs_BTC: Tensor, labels_BT: Tensor) -> Tensor:
        return cross_entropy(outputs_BTC.flatten(0, 1), labels_BT.flatten(0, 1))

    every = torch.arange(0, len(test) - timesteps - 1, timesteps)
    return Task(draw, cut(test, every), loss, score, 0.0, _CHARACTERS)


@cache
def addition(timesteps: int, batch_size: int) -> Task:
    """The adding problem; the score is the share of the variance that is explained."""
    make = adding(timesteps)

    def score(outputs: Tensor, labels: Tensor) -> float:
        return float(1.0 - mse_loss(outputs.squeeze(-1), labels) / labels.var())

    return Task(
        lambda generator: make(batch_size, generator),
        make(_TEST, torch.Generator().manual_seed(10**6)),
        lambda outputs, labels: mse_loss(outputs.squeeze(-1), labels),
        score,
        0.0,
        0,
    )


@cache
def order(timesteps: int, batch_size: int) -> Task:
    """Which two symbols came, and in which order."""
    make = temporal_order(timesteps)
    return Task(
        lambda generator: make(batch_size, generator),
        make(_TEST, torch.Generator().manual_seed(10**6)),
        cross_entropy,
        _accuracy,
        0.25,
        4,
    )


@torch.no_grad()
def score_of(model: nn.Module, task: Task) -> float:
    """The score on the test batch, never below the floor: so bad is who knows nothing."""
    model.eval()
    score = task.score(model(task.test[0]), task.test[1])
    model.train()
    return max(score, task.floor) if math.isfinite(score) else task.floor


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    finite = outputs.isfinite().all(-1)
    return float(((outputs.argmax(-1) == labels) & finite).float().mean())
