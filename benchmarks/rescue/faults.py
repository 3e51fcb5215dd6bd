"""What goes wrong in the middle of a run that is otherwise healthy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import Optimizer

from benchmarks.rescue.tasks import Batch, Task

# Steps for which the learning rate is wrong.
_LONG = 10


@dataclass
class Run:
    """What a fault can reach.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        task: What it learns.
    """

    model: nn.Module
    optimizer: Optimizer
    task: Task


Fault = Callable[[Run, Batch, int], Batch]
"""Takes the run, the batch and the number of steps since it began; returns the batch to use."""


def nan_batch(run: Run, batch: Batch, since: int) -> Batch:
    """One input of one example is NaN."""
    if since != 0:
        return batch
    inputs = batch[0].clone()
    inputs[0, 0] = math.nan
    return inputs, batch[1]


def inf_label(run: Run, batch: Batch, since: int) -> Batch:
    """One label is infinite; classes are given as probabilities."""
    if since != 0:
        return batch
    labels = batch[1]
    soft: Tensor = one_hot(labels, run.task.classes).float() if run.task.classes else labels.clone()
    soft.view(-1)[0] = math.inf
    return batch[0], soft


def outlier_batch(run: Run, batch: Batch, since: int) -> Batch:
    """All inputs of a batch are 10,000 times what they should be."""
    return (1e4 * batch[0], batch[1]) if since == 0 else batch


@torch.no_grad()
def corrupted_weight(run: Run, batch: Batch, since: int) -> Batch:
    """The highest bit of the exponent of one weight flips, as faulty memory does it."""
    if since == 0:
        weight = max(run.model.parameters(), key=lambda p: p.numel() if p.dim() > 1 else 0)
        middle = weight.view(-1)[weight.numel() // 2 :][:1]
        middle.view(torch.int32).bitwise_xor_(1 << 30)
    return batch


def rate_x1000(run: Run, batch: Batch, since: int) -> Batch:
    """The learning rate is 1,000 times what it should be, for 10 steps."""
    factor = {0: 1000.0, _LONG: 1 / 1000.0}.get(since)
    if factor is not None:
        for group in run.optimizer.param_groups:
            group["lr"] *= factor
    return batch


FAULTS: dict[str, Fault] = {
    "nan_batch": nan_batch,
    "inf_label": inf_label,
    "outlier_batch": outlier_batch,
    "corrupted_weight": corrupted_weight,
    "rate_x1000": rate_x1000,
}
