"""A step that was dropped does not count for the learning-rate schedule."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class _Held:
    """Where the schedules of one optimizer stood.

    Attributes:
        by_step: Those that count steps, with their states.
        by_epoch: Those that count epochs in ``last_epoch``, with their states.
        groups: The parameter groups, with their hyperparameters.
    """

    by_step: list[tuple[Any, dict[str, Any]]]
    by_epoch: list[tuple[Any, dict[str, Any]]]
    groups: list[tuple[dict[str, Any], dict[str, Any]]]

    def put_back(self, trainer: Trainer) -> None:
        """Undo the steps; an epoch that has ended meanwhile is counted again, from there."""
        ended = [s for s, state in self.by_epoch if s.last_epoch != state["last_epoch"]]
        for scheduler, state in (*self.by_step, *self.by_epoch):
            scheduler.load_state_dict(state)
        for group, values in self.groups:
            for name, value in values.items():
                if isinstance(value, Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = value
        for scheduler in ended:
            trainer.lightning_module.lr_scheduler_step(scheduler, None)


class ScheduleHold:
    """Undoes the advance that Lightning makes after a step, if the step was dropped.

    Lightning steps its schedulers after every optimizer step and asks nobody. What they change is
    their own state and the hyperparameters of the parameter groups, so both are put back.
    """

    def __init__(self) -> None:
        self._held: dict[Optimizer, _Held] = {}

    def hold(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Remember where the schedules of ``optimizer`` stand."""
        by_step, by_epoch = [], []
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            # One that waits for a plateau is stepped later, when this is over.
            if scheduler.optimizer is not optimizer or config.reduce_on_plateau:
                continue
            state = copy.deepcopy(scheduler.state_dict())
            if config.interval == "step":
                by_step.append((scheduler, state))
            elif "last_epoch" in state:
                by_epoch.append((scheduler, state))
        if by_step:
            groups = [(group, _hyperparameters(group)) for group in optimizer.param_groups]
            self._held[optimizer] = _Held(by_step, by_epoch, groups)

    def release(self, trainer: Trainer, optimizer: Optimizer | None = None) -> None:
        """Put the schedules back to where they stood, if :meth:`hold` was called.

        Args:
            trainer: The Trainer of the fit.
            optimizer: Whose; default: of all optimizers.
        """
        for key in [optimizer] if optimizer is not None else list(self._held):
            held = self._held.pop(key, None)
            if held is not None:
                held.put_back(trainer)


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }
