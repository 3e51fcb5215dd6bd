"""What an engine has to know of the run around it."""

from __future__ import annotations

import math
from typing import TypedDict

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_gradguard.record import Recorder


class Surroundings(TypedDict):
    """Arguments of :class:`~lightning_gradguard.guard.GuardEngine` that follow from the Trainer.

    Attributes:
        recorder: Where findings and actions go.
        trained_elsewhere: Parameters that the Trainer's other optimizers update.
        planned_steps: Optimizer steps that the fit will take; ``None`` if that is open.
        precision: As the Trainer names it.
        optimizers: How many the Trainer has.
    """

    recorder: Recorder
    trained_elsewhere: list[nn.Parameter]
    planned_steps: int | None
    precision: str
    optimizers: int


def surroundings(trainer: Trainer, optimizer: Optimizer, recorder: Recorder) -> Surroundings:
    """What the engine of ``optimizer`` has to know, once training has started."""
    others = [other for other in trainer.optimizers if other is not optimizer]
    return Surroundings(
        recorder=recorder,
        trained_elsewhere=[p for other in others for g in other.param_groups for p in g["params"]],
        planned_steps=planned_steps(trainer),
        precision=str(trainer.precision),
        optimizers=len(trainer.optimizers),
    )


def logged_step(trainer: Trainer) -> int:
    """The step as loggers count it, which has no public name: that of the batch under way."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001


def logged_axes(trainer: Trainer) -> tuple[dict[str, float], int]:
    """Where Lightning will log its own values of the step that is over.

    Returns:
        The epoch by its key, and the step. A user who logs ``step`` or ``epoch`` decides, as
        Lightning has it.
    """
    own = trainer._logger_connector.metrics["log"]  # noqa: SLF001 - has no public name
    if "step" in own:
        return {}, int(own["step"])
    return {"epoch": float(own.get("epoch", trainer.current_epoch))}, logged_step(trainer)


def logs_now(trainer: Trainer) -> bool:
    """Lightning's own rule for when a value that is logged now is kept."""
    every_n_steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set late
    if not every_n_steps:
        return False
    return (logged_step(trainer) + 1) % every_n_steps == 0 or trainer.should_stop


def planned_steps(trainer: Trainer) -> int | None:
    """Lightning's own estimate: of all optimizers together under manual optimization."""
    planned = trainer.estimated_stepping_batches
    return int(planned) if math.isfinite(planned) and planned >= 1 else None
