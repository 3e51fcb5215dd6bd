"""All runs of the benchmark, and those that are already done.

Results are appended to one file per contender as they come in, so that a benchmark of hours can be
interrupted, and only what has changed is run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

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


class Kept:
    """Results in a folder.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.results: dict[Job, Result] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.results[Job(**row["job"])] = Result(**row["result"])

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that have no result yet."""
        return [job for job in jobs if job not in self.results]

    def add(self, job: Job, result: Result) -> None:
        """Take in one more."""
        self.results[job] = result
        self._folder.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "_" for c in job.contender)
        with (self._folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"job": asdict(job), "result": result.to_dict()}) + "\n")
