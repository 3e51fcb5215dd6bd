"""The most memory that torch has in use at a time during one training step."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.overhead.memory import peak
from benchmarks.timesteps.models import Task
from benchmarks.timesteps.variants import Step, Variant


def peak_memory(task: Task, variant: Variant) -> int:
    """Bytes at the peak of a step that is not the first one.

    What the step adds to what was in use before it, and the weights, gradients and batch, which
    were.
    """
    with variant(task) as step:
        step()
        added = added_by(step, task.device)
    parameters = list(task.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return 2 * weights + task.inputs.numel() * task.inputs.element_size() + added


def added_by(step: Step, device: str) -> int:
    """Bytes at the peak of a step, beyond what was in use before it."""
    return _added_on_cuda(step) if device == "cuda" else _added_on_cpu(step)


def _added_on_cuda(step: Step) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _added_on_cpu(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return peak(profiler)
