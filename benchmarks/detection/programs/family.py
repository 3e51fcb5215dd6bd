"""How programs are declared: a family at a time, the failing one beside its healthy twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim.lr_scheduler import LRScheduler

from benchmarks.detection.records import Program, Setup
from benchmarks.detection.tasks import Batch, Target
from lightning_gradguard.diagnose import Pathology

Build = Callable[[int], Setup]


@dataclass(frozen=True)
class Family:
    """Programs that are held out together."""

    name: str

    def failing(
        self,
        name: str,
        build: Build,
        steps: int,
        target: Target,
        causes: tuple[Pathology, ...],
        about: str,
        *,
        layers: tuple[str, ...] = (),
        onset: int = 0,
    ) -> Program:
        """One with the fault; the first cause is the label."""
        return Program(
            name=name,
            family=self.name,
            faulty=True,
            steps=steps,
            target=target.value,
            higher_is_better=target.higher_is_better,
            build=partial(_seeded, build),
            causes=tuple(cause.value for cause in causes),
            layers=layers,
            onset=onset,
            about=about,
        )

    def healthy(self, name: str, build: Build, steps: int, target: Target, about: str) -> Program:
        """One without a fault, that looks like it to a careless eye."""
        return Program(
            name=name,
            family=self.name,
            faulty=False,
            steps=steps,
            target=target.value,
            higher_is_better=target.higher_is_better,
            build=partial(_seeded, build),
            about=about,
        )


def spoiled(
    batch: Callable[[int], Batch], when: Callable[[int], bool], spoil: Callable[[Batch], Batch]
) -> Callable[[int], Batch]:
    """The same batches, some of them spoiled.

    Args:
        batch: Returns the batch of a step.
        when: Whether the batch of a step is to be spoiled.
        spoil: Makes another one of it.
    """

    def changed(step: int) -> Batch:
        return spoil(batch(step)) if when(step) else batch(step)

    return changed


def scheduled(setup: Setup, scheduler: LRScheduler) -> Setup:
    """The set-up with a schedule that steps after every optimizer step."""

    def step(number: int) -> None:
        scheduler.step()

    setup.after_step = step
    return setup


def _seeded(build: Build, seed: int) -> Setup:
    """Weights, and whatever else is drawn from torch's own generator, follow from the seed."""
    torch.manual_seed(seed)
    return build(seed)
