"""Ratios of time to plain training steps of the same model, from turns next to each other."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.overhead.timing import Ratios, Schedule
from benchmarks.overhead.turns import Turn
from benchmarks.timesteps.models import Task
from benchmarks.timesteps.variants import Variant, plain


def compare(
    task: Task,
    variants: Mapping[str, Variant],
    schedule: Schedule,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Quartiles of the ratio of each variant to plain training, by both clocks.

    A round goes plain, a, b, plain, c, d, plain, …: each variant is next to one plain turn, and all
    train the same weights in the same memory. Their order changes from round to round.
    """
    results = {name: Ratios() for name in variants}
    for _ in range(schedule.warm_steps):
        task.step()
    for variant in variants.values():
        take_turn(task, variant, 1)
    order = random.Random(0)
    # As in a run of its own: nothing that other benchmarks have left is looked through.
    gc.collect()
    gc.freeze()
    try:
        for number in range(schedule.rounds):
            say(f"{task.kind}: round {number + 1} of {schedule.rounds}")
            _round(task, variants, order, schedule.steps, results)
    finally:
        gc.unfreeze()
    return {
        name: {clock: ratios.summary(clock, schedule.steps) for clock in ("cpu", "wall")}
        for name, ratios in results.items()
    }


def _round(
    task: Task,
    variants: Mapping[str, Variant],
    order: random.Random,
    steps: int,
    results: Mapping[str, Ratios],
) -> None:
    names = order.sample(list(variants), len(variants))
    before = take_turn(task, plain, steps)
    for first, *second in (names[i : i + 2] for i in range(0, len(names), 2)):
        results[first].add(take_turn(task, variants[first], steps), before)
        turns = [(name, take_turn(task, variants[name], steps)) for name in second]
        before = take_turn(task, plain, steps)
        for name, turn in turns:
            results[name].add(turn, before)


def take_turn(task: Task, variant: Variant, steps: int) -> Turn:
    """Time ``steps`` steps, after one that is not timed."""
    with variant(task) as step:
        step()
        started = _now(task.device)
        for _ in range(steps):
            step()
        ended = _now(task.device)
    wall, cpu = (b - a for a, b in zip(started, ended, strict=True))
    return Turn(wall, cpu, logs=False)


def _now(device: str) -> tuple[float, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()
