"""One run: a task, a model, a learning rate and a seed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.memory.models import Model, Reader, select
from benchmarks.memory.spans import measure_span
from benchmarks.memory.tasks import Workload, workload_named
from benchmarks.workers import flushed_denormals
from lightning_gradguard.nn import skip_budget_loss, update_share
from lightning_gradguard.tasks import SequenceTask

MAX_NORM = 1.0
# Steps between validations, where a run may end.
CHECK_EVERY = 100


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        workload: Name of the workload.
        model: Name of the model.
        lr: Learning rate.
        seed: Of weights and data.
        steps: Budget; 0 for the workload's own.
        device: Where it is trained.
    """

    workload: str
    model: str
    lr: float
    seed: int
    steps: int = 0
    device: str = "cpu"

    @property
    def key(self) -> str:
        """Tells it from all others."""
        parts = (self.workload, self.model, f"{self.lr:g}", str(self.seed), str(self.steps))
        return "|".join((*parts, self.device))


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Attributes:
        value: The metric at its end, on the test set; NaN where the outputs are not finite.
        validation: The same on the validation set.
        solved_at: Step after which the validation set was first found solved; 0 for never.
        steps: How many were made, of ``budget``.
        budget: How many there were to make.
        seconds: For them: of this thread's processor, on other devices by the clock.
        parameters: Of the model, its head included.
        before: :class:`~benchmarks.memory.spans.Span` before the first step, as plain values.
        after: The same after the last one.
        updates: Share of the timesteps at which a model that skips updates its state, on the test
            set at the end; ``None`` of others.
    """

    value: float
    validation: float
    solved_at: int
    steps: int
    budget: int
    seconds: float
    parameters: int
    before: dict[str, Any]
    after: dict[str, Any]
    updates: float | None


def run_job(job: Job) -> Result:
    """Train once; the data of a seed are the same for every model."""
    torch.set_num_threads(1)
    (model,) = select([job.model])
    workload = workload_named(job.workload)
    with flushed_denormals():
        return train(workload, model, job.lr, job.seed, job.steps, job.device)


def train(
    workload: Workload, model: Model, lr: float, seed: int, steps: int = 0, device: str = "cpu"
) -> Result:
    """Train a model; it ends when the validation set is solved, unless it skips.

    What a model that skips should save is learned after the task, so it goes on to the end.
    """
    task, budget = workload.task(seed), steps or workload.steps
    torch.manual_seed(seed)
    reader = model.make(task).to(device)
    before = measure_span(reader, task, device)
    optimizer = torch.optim.Adam(reader.parameters(), lr=lr)
    clock = time.thread_time if device == "cpu" else time.perf_counter
    started, made, solved_at, validation = clock(), 0, 0, math.nan
    for made, batch in enumerate(islice(workload.batches(seed), budget), start=1):
        _step(reader, workload, task, optimizer, batch, device)
        if made % CHECK_EVERY and made != budget:
            continue
        validation = evaluate(reader, workload, task, "val", device)
        if workload.solved(validation) and not solved_at:
            solved_at = made
        if math.isnan(validation) or (solved_at and not reader.skips):
            break
    seconds = clock() - started
    value = evaluate(reader, workload, task, "test", device)
    return Result(
        value=value,
        validation=validation,
        solved_at=solved_at,
        steps=made,
        budget=budget,
        seconds=seconds,
        parameters=sum(parameter.numel() for parameter in reader.parameters()),
        before=before.to_dict(),
        # Last, because its forward pass has gates of its own.
        updates=_updates(reader),
        after=measure_span(reader, task, device).to_dict(),
    )


def _step(
    reader: Reader,
    workload: Workload,
    task: SequenceTask,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    device: str,
) -> None:
    inputs, targets = batch[0].to(device), batch[1].to(device)
    loss = task.loss(reader(inputs), targets)
    if reader.gates is not None:
        loss = loss + skip_budget_loss(reader.gates, workload.update_cost, batch_first=True)
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(reader.parameters(), MAX_NORM)
    optimizer.step()


def seconds_per_step(workload: Workload, model: Model, device: str, steps: int = 3) -> float:
    """Measured on a few steps of training, after one that is not counted."""
    task = workload.task(0)
    reader = model.make(task).to(device)
    optimizer = torch.optim.Adam(reader.parameters())
    started = 0.0
    with flushed_denormals():
        for made, batch in enumerate(islice(workload.batches(0), steps + 1)):
            if made == 1:
                started = time.perf_counter()
            _step(reader, workload, task, optimizer, batch, device)
    return (time.perf_counter() - started) / steps


@torch.no_grad()
def evaluate(
    reader: Reader, workload: Workload, task: SequenceTask, split: str, device: str
) -> float:
    """The metric on a split; NaN where an output is not finite."""
    inputs, targets = task.split("val" if split == "val" else "test").batch()
    outputs = reader(inputs.to(device))
    if not bool(outputs.isfinite().all()):
        return math.nan
    return workload.measure(task, outputs, targets.to(device))


def _updates(reader: Reader) -> float | None:
    """Of the last forward pass."""
    if reader.gates is None:
        return None
    return float(update_share(reader.gates, batch_first=True))
