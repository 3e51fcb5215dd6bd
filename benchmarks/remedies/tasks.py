"""What is learned: classification tasks whose test accuracy is the score of every program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Batches to train on, and those that judge.

    Attributes:
        draw: Makes a training batch from a generator of random numbers.
        judge: The examples that the accuracy is measured on.
        classes: Number of classes, so that chance is one in as many.
    """

    draw: Callable[[torch.Generator], Batch]
    judge: Batch
    classes: int


@cache
def digits(scale: float = 1.0, batch_size: int = 64) -> Task:
    """Scikit-learn's handwritten digits as vectors of 64 pixels, standardized, times `scale`."""
    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, labels = inputs[order], labels[order]
    train, test = slice(0, 1400), slice(1400, None)
    mean, deviation = inputs[train].mean(0), inputs[train].std(0).clamp_min(1e-2)
    inputs = (inputs - mean) / deviation * scale

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(1400, (batch_size,), generator=generator)
        return inputs[chosen], labels[chosen]

    return Task(draw, (inputs[test], labels[test]), 10)


@cache
def raw_digits(scale: float = 100.0) -> Task:
    """The same as they are, each pixel from 0 to 16, in units that make them larger."""
    task = digits()
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(data.data, dtype=torch.float32)[order] * scale
    labels = torch.tensor(data.target)[order]

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(1400, (64,), generator=generator)
        return inputs[chosen], labels[chosen]

    return Task(draw, (inputs[1400:], labels[1400:]), task.classes)


@cache
def first_input(timesteps: int = 60, classes: int = 4, batch_size: int = 32) -> Task:
    """Name the symbol that a sequence (T, B, classes) of noise begins with."""

    def make(count: int, generator: torch.Generator) -> Batch:
        labels = torch.randint(classes, (count,), generator=generator)
        inputs = 0.3 * torch.randn(timesteps, count, classes, generator=generator)
        inputs[0] = torch.nn.functional.one_hot(labels, classes).float()
        return inputs, labels

    judge = make(400, torch.Generator().manual_seed(999))
    return Task(lambda generator: make(batch_size, generator), judge, classes)


@cache
def digits_with_nan(every: int = 25) -> Task:
    """The digits, where about one batch in `every` holds a NaN."""
    task = digits()

    def draw(generator: torch.Generator) -> Batch:
        inputs, labels = task.draw(generator)
        if torch.randint(every, (), generator=generator) == 0:
            inputs[0, 0] = torch.nan
        return inputs, labels

    return Task(draw, task.judge, task.classes)
