"""Time and memory of every contender, as a multiple of what the module of torch takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.modules.contenders import BASELINES, CONTENDERS, Contender
from benchmarks.modules.passes import WAYS, Passes
from benchmarks.modules.results import ABSENT
from benchmarks.overhead.timing import Schedule
from benchmarks.timesteps.memory import added_by
from benchmarks.timesteps.models import Shape, Task
from benchmarks.timesteps.timing import compare
from benchmarks.timesteps.variants import Step


@dataclass(frozen=True)
class Setting:
    """What is measured at once.

    Args:
        shape: Sizes.
        dtype: Of weights and input.
        schedule: How long is measured.
    """

    shape: Shape
    dtype: torch.dtype
    schedule: Schedule

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {**self.shape._asdict(), "dtype": dtype, "schedule": vars(self.schedule)}


def measure(
    setting: Setting, kinds: list[str], device: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each contender, and each way to run it.

    Args:
        setting: What is measured.
        kinds: Of ``"lstm"``, ``"gru"`` and ``"rnn"``.
        device: ``"cpu"`` or ``"cuda"``.
        say: Told about progress.
    """
    rows: list[dict[str, Any]] = []
    for beside, make in BASELINES.items():
        if beside.partition(",")[0] not in kinds:
            continue
        baseline = Passes(beside, make, setting.shape, device, setting.dtype)
        baseline.step()
        memory = added_by(baseline.step, device)
        group = [contender for contender in CONTENDERS if contender.beside == beside]
        rows += _group(group, baseline, memory, setting, say)
    return rows


def _group(
    group: list[Contender],
    baseline: Passes,
    memory: int,
    setting: Setting,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All that are beside one module of torch, each round all of them."""
    rows: list[dict[str, Any]] = []
    running: dict[int, Passes] = {}
    for contender in group:
        as_it_is = len(rows)
        for way in [
            "",
            *(WAYS if contender.target == "cell" and baseline.device == "cuda" else []),
        ]:
            row: dict[str, Any] = {
                "name": contender.name, "beside": contender.beside, "way": way,
                "target": contender.target, "why_not": "",
            }  # fmt: skip
            rows.append(row)
            say(f"{contender.name} {way}")
            passes = _made(contender, way, baseline, setting, row)
            if passes is not None:
                if way:
                    row["apart"] = passes.apart(running[as_it_is])
                else:  # a graph has memory of its own, which a pass adds nothing to
                    row["bytes"] = added_by(passes.step, baseline.device)
                    row["memory"] = row["bytes"] / memory
                running[len(rows) - 1] = passes
    variants = {str(number): _variant(passes) for number, passes in running.items()}
    clock = "wall" if baseline.device == "cuda" else "cpu"
    for number, summary in compare(baseline, variants, setting.schedule, say).items():
        rows[int(number)]["time"] = summary[clock]
    gc.collect()
    return rows


def _made(
    contender: Contender, way: str, baseline: Passes, setting: Setting, row: dict[str, Any]
) -> Passes | None:
    """What has made one pass; else ``None``, and the row says why."""
    if not contender.installed:
        row["why_not"] = ABSENT
        return None
    try:
        passes = Passes(
            contender.name, contender.make, setting.shape, baseline.device, setting.dtype,
            WAYS.get(way),
        )  # fmt: skip
        passes.step()
    except Exception as error:
        if not way:
            raise
        # What the compiler and CUDA graphs cannot do is a result as well.
        row["why_not"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        return None
    return passes


def _variant(passes: Passes) -> Callable[[Task], AbstractContextManager[Step]]:
    @contextmanager
    def variant(task: Task) -> Iterator[Step]:
        yield passes.step

    return variant
