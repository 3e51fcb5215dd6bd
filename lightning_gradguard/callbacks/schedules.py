"""A step that was dropped does not count for the learning-rate schedule."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer


class ScheduleHold:
    """Undoes the advance that Lightning makes after a step, if the step was dropped.

    Lightning steps its schedulers after every optimizer step and asks nobody. What they change is
    their own state and the hyperparameters of the parameter groups, so both are put back.
    """

    def __init__(self) -> None:
        self._schedulers: list[tuple[Any, dict[str, Any]]] = []
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def hold(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Remember where the schedules of ``optimizer`` stand."""
        schedulers = [
            config.scheduler
            for config in trainer.lr_scheduler_configs
            if config.interval == "step" and config.scheduler.optimizer is optimizer
        ]
        self._schedulers = [(s, copy.deepcopy(s.state_dict())) for s in schedulers]
        self._groups = [(group, _hyperparameters(group)) for group in optimizer.param_groups]

    def release(self) -> None:
        """Put the schedules back to where they stood, if :meth:`hold` was called."""
        if not self._schedulers:
            return
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(state)
        for group, values in self._groups:
            for name, value in values.items():
                if isinstance(value, Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = value
        self._schedulers, self._groups = [], []


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }
