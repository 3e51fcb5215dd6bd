"""One run: a workload, an optimizer, a learning rate, a seed, a contender and perhaps a fault."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.rescue.contenders import Contender, Guard, select
from benchmarks.rescue.faults import FAULTS, Run
from benchmarks.rescue.tasks import score_of
from benchmarks.rescue.workloads import WORKLOADS, Workload
from benchmarks.workers import flushed_denormals
from lightning_gradguard import Severity

# How often weights are looked at that nothing can bring back once they are not finite.
_LOOK_EVERY = 10


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        workload: Name of the workload.
        optimizer: Name of the optimizer.
        lr: Learning rate.
        seed: Of weights and batches.
        contender: Name of the contender.
        fault: Name of the fault, empty for none.
        steps: Budget; 0 for the workload's own.
        device: Where it is trained.
    """

    workload: str
    optimizer: str
    lr: float
    seed: int
    contender: str
    fault: str = ""
    steps: int = 0
    device: str = "cpu"

    @property
    def key(self) -> str:
        """Tells it from all others."""
        parts = (self.workload, self.optimizer, f"{self.lr:g}", str(self.seed), self.contender)
        return "|".join((*parts, self.fault, str(self.steps), self.device))


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Attributes:
        score: At its end, at least the task's floor.
        seconds: For all steps: of this thread's processor, on other devices by the clock.
        finite: Whether the weights are finite at its end.
        done: What the guard did, by kind of action; steps that were clipped and capped.
        warnings: Findings of the guard that were warnings or worse.
    """

    score: float
    seconds: float
    finite: bool
    done: dict[str, int]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def workload_named(name: str) -> Workload:
    """The workload of this name."""
    return next(workload for workload in WORKLOADS if workload.name == name)


def run_job(job: Job) -> Result:
    """Train once, from the same weights and batches for every contender."""
    torch.set_num_threads(1)
    workload = workload_named(job.workload)
    (contender,) = select([job.contender])
    with flushed_denormals(), _silence():
        return _train(job, workload, contender)


@contextmanager
def _silence() -> Iterator[None]:
    """What the guard says of thousands of runs would hide how far they are."""
    logger = logging.getLogger("lightning_gradguard")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _train(job: Job, workload: Workload, contender: Contender) -> Result:
    task, steps = workload.task(), job.steps or workload.steps
    torch.manual_seed(job.seed)
    model = workload.net().to(job.device)
    optimizer = contender.optimizer(job.optimizer, model, job.lr)
    protection = contender.start(model, optimizer, steps)
    generator = torch.Generator().manual_seed(job.seed)
    run = Run(model, optimizer, task)
    begins = _fault_step(job, steps)
    clock = time.thread_time if job.device == "cpu" else time.perf_counter
    started = clock()
    for step in range(steps):
        inputs, labels = task.draw(generator)
        batch = inputs.to(job.device), labels.to(job.device)
        if job.fault and step >= begins:
            batch = FAULTS[job.fault](run, batch, step - begins)
        loss = task.loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        protection.before_step(loss.detach())
        optimizer.step()
        protection.after_step(loss.detach())
        if step % _LOOK_EVERY == 0 and not contender.revives and not _finite(model):
            break
        if isinstance(protection, Guard) and protection.engine.should_stop:
            break
    seconds = clock() - started
    protection.close()
    finite = _finite(model)
    score = score_of(model.cpu(), task) if finite else task.floor
    return Result(score, seconds, finite, *_what_was_done(protection))


def _fault_step(job: Job, steps: int) -> int:
    """Between 40% and 60% of the run, by the seed alone."""
    generator = torch.Generator().manual_seed(1000 + job.seed)
    share = 0.4 + 0.2 * float(torch.rand((), generator=generator))
    return round(share * steps)


def _finite(model: torch.nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _what_was_done(protection: object) -> tuple[dict[str, int], list[str]]:
    if not isinstance(protection, Guard):
        return {}, []
    engine = protection.engine
    done = {name: count for name, count in engine.counts.items() if name != "steps"}
    for action in engine.actions:
        done[action.kind.value] = done.get(action.kind.value, 0) + 1
    serious = [f.pathology.value for f in engine.findings if f.severity >= Severity.WARNING]
    return done, sorted(set(serious))
