"""The most memory that torch has in use at a time while a contender trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.overhead.contenders import Contender
from benchmarks.overhead.workloads import Batch, Workload


def peak_memory(
    workload: Workload,
    contender: Contender,
    *,
    optimizer: str,
    device: str,
    directory: Path,
    steps: int,
) -> int:
    """Bytes at the peak of a fit of ``steps`` steps, its first step included.

    On a GPU from the allocator's own peak. On a CPU from the events that torch's allocator reports
    to the profiler, added up from before the fit; memory of the weights themselves, which exist
    before, comes on top.
    """
    module = workload.make_module(optimizer)
    batches = workload.make_batches(device)
    trainer = contender.make_trainer(module, directory, device)
    feed: Iterator[Batch] = itertools.islice(itertools.cycle(batches), steps)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.fit(module, feed)
        return int(torch.cuda.max_memory_allocated())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.fit(module, feed)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return weights + peak(profiler)


def peak(profiler: profile) -> int:
    kineto = profiler.profiler.kineto_results if profiler.profiler else None
    if kineto is None:
        raise RuntimeError("the profiler kept no events")
    changes = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in kineto.events()
        if event.name() == "[memory]"
    ]
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0)
