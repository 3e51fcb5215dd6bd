"""What has to be remembered: a task, when it is solved, its budget, and which models try it.

Every batch is drawn anew, so that no sequence is seen twice; those of a seed are the same for all
models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from lightning_gradguard.tasks import (
    AddingProblem,
    CopyMemory,
    FrequencyDiscrimination,
    SequenceTask,
    TemporalOrder,
)

Metric = Literal["MSE", "cross entropy", "accuracy"]
Make = Callable[..., SequenceTask]

# Sequences that validate and that the final metric is taken of.
HELD_OUT = 500
# Batches that are drawn at a time.
_CHUNK = 25
# Seeds of training data that one run may use.
_SEEDS_A_RUN = 10_000


@dataclass(frozen=True)
class Workload:
    """One task, and who learns it.

    Attributes:
        name: As in the tables.
        make: Makes the task, from sizes and a seed.
        metric: What is published of it.
        target: Solved below it, or for an accuracy at it.
        models: Names of the models that try it.
        steps: Budget.
        update_cost: λ of an update in the loss of models that skip.
        batch_size: Sequences in a batch.
    """

    name: str
    make: Make
    metric: Metric
    target: float
    models: tuple[str, ...]
    steps: int
    update_cost: float
    batch_size: int = 32

    def task(self, seed: int, train_size: int = 1) -> SequenceTask:
        """The task of a seed."""
        sizes = {"train_size": train_size, "val_size": HELD_OUT, "test_size": HELD_OUT}
        return self.make(batch_size=self.batch_size, seed=seed, **sizes)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches to train on, without end; none of them is of the task of a small seed."""
        for number in range(_SEEDS_A_RUN):
            drawn = self.task(_SEEDS_A_RUN * (seed + 1) + number, _CHUNK * self.batch_size)
            parts = (part.split(self.batch_size) for part in drawn.split("train").batch())
            yield from zip(*parts, strict=True)

    @property
    def nothing(self) -> float:
        """The metric of whoever remembers nothing."""
        task = self.task(0)
        return 1.0 / task.classes if self.metric == "accuracy" else task.baseline

    @property
    def timesteps(self) -> int:
        """Length of a sequence."""
        return self.task(0).length

    def solved(self, value: float) -> bool:
        """Whether a value of the metric reaches the target; NaN does not."""
        return value >= self.target if self.metric == "accuracy" else value < self.target

    def progress(self, value: float) -> float:
        """How far a value is from knowing nothing, at 0, to the target, at 1, and no farther."""
        return min(max(self.way(value), 0.0), 1.0)

    def way(self, value: float) -> float:
        """The same without bounds: below 0 who does worse than to know nothing."""
        if math.isnan(value):
            return -math.inf
        return (value - self.nothing) / (self.target - self.nothing)

    def measure(self, task: SequenceTask, outputs: Tensor, targets: Tensor) -> float:
        """The metric of these outputs."""
        taken = task.score if self.metric == "accuracy" else task.loss
        return float(taken(outputs, targets))


# The two costs that Campos et al. take, for a mean squared error and for a cross entropy.
_OF_MSE, _OF_ENTROPY = 1e-5, 1e-4

_PLAIN = ("tanh RNN", "IRNN", "TemporalSkipRNN")
_LSTMS = ("LSTM", "LSTM forget bias 1", "LSTM chrono")
_NORMED, _SKIPPING = ("LayerNormLSTM", "LayerNormGRU"), ("SkipLSTM", "SkipGRU")


def _adding_50(length: int = 50, **sizes: int) -> SequenceTask:
    """As Campos et al. have it."""
    return AddingProblem(length, "first_tenth", -0.5, 0.5, **sizes)


WORKLOADS = (
    Workload(
        "adding_50",
        _adding_50,
        "MSE",
        1.67e-3,  # a hundredth of the variance of the sum
        (*_PLAIN, *_LSTMS, "GRU", *_NORMED, *_SKIPPING, "DilatedRNN"),
        2000,
        _OF_MSE,
    ),
    Workload(
        "adding_200",
        partial(AddingProblem, 200),
        "MSE",
        1e-3,
        (*_PLAIN, *_LSTMS, "GRU"),
        3000,
        _OF_MSE,
    ),
    Workload(
        "copy_100",
        partial(CopyMemory, 100),
        "cross entropy",
        math.log(8) / 120,  # a tenth of the baseline
        (*_PLAIN, *_LSTMS, "GRU", "DilatedRNN"),
        1500,
        _OF_ENTROPY,
    ),
    Workload(
        "order_100",
        partial(TemporalOrder, 100),
        "accuracy",
        0.99,
        (*_PLAIN, *_LSTMS, "GRU", *_NORMED, "DilatedRNN"),
        1500,
        _OF_ENTROPY,
    ),
    Workload(
        "frequency_100",
        partial(FrequencyDiscrimination, 100),
        "accuracy",
        0.99,
        ("tanh RNN", *_LSTMS, "GRU", *_SKIPPING),
        1500,
        _OF_ENTROPY,
    ),
)

# Short enough for a look at whether everything works.
QUICK = (
    Workload(
        "adding_20",
        partial(_adding_50, 20),
        "MSE",
        1.67e-3,
        WORKLOADS[0].models,
        200,
        _OF_MSE,
    ),
    Workload(
        "order_20",
        partial(TemporalOrder, 20),
        "accuracy",
        0.99,
        WORKLOADS[0].models,
        200,
        _OF_ENTROPY,
    ),
)


def workload_named(name: str) -> Workload:
    """The workload of this name, quick ones too."""
    return next(workload for workload in (*WORKLOADS, *QUICK) if workload.name == name)
