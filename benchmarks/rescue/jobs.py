"""All runs of the benchmark, and those that are already done.

Results are appended to one file per contender as they come in, so that a benchmark of hours can be
interrupted, and only what has changed is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import kept
from benchmarks.rescue.contenders import Contender
from benchmarks.rescue.faults import FAULTS
from benchmarks.rescue.runner import Job, Result
from benchmarks.rescue.workloads import OPTIMIZERS, Workload


def grid_jobs(
    workloads: Sequence[Workload],
    contenders: Sequence[Contender],
    seeds: int,
    *,
    stride: int = 1,
    steps: int = 0,
    device: str = "cpu",
) -> list[Job]:
    """No fault, at every ``stride``-th learning rate of the grids."""
    return [
        Job(workload.name, optimizer, lr, seed, contender.name, steps=steps, device=device)
        for seed in range(seeds)
        for workload in workloads
        for optimizer in OPTIMIZERS
        for lr in workload.rates(optimizer)[::stride]
        for contender in contenders
        if optimizer in contender.optimizers
    ]


def fault_jobs(
    workloads: Sequence[Workload],
    contenders: Sequence[Contender],
    seeds: int,
    *,
    steps: int = 0,
    device: str = "cpu",
) -> list[Job]:
    """Every fault, and none, at the workload's ordinary learning rate."""
    return [
        Job(workload.name, optimizer, lr, seed, contender.name, fault, steps, device)
        for seed in range(seeds)
        for workload in workloads
        for optimizer, lr in (workload.ordinary,)
        for fault in ("", *FAULTS)
        for contender in contenders
        if optimizer in contender.optimizers
    ]


class Kept(kept.Kept[Job, Result]):
    """Results in a folder, one file per contender.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Job, Result, lambda job: job.contender)
