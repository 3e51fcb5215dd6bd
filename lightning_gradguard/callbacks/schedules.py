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
                _set(group, name, value)
        for scheduler in ended:
            trainer.lightning_module.lr_scheduler_step(scheduler, None)


@dataclass(frozen=True)
class _Plateau:
    """Where a schedule that waits for a plateau stood.

    Attributes:
        scheduler: The schedule.
        state: Its state.
        rates: The parameter groups, with their learning rates.
    """

    scheduler: Any
    state: dict[str, Any]
    rates: list[tuple[dict[str, Any], Any]]

    def put_back(self) -> None:
        """Undo its step, if it has made one."""
        if self.scheduler.last_epoch == self.state["last_epoch"]:
            return
        self.scheduler.load_state_dict(self.state)
        for group, rate in self.rates:
            _set(group, "lr", rate)


class ScheduleHold:
    """Undoes the advance that Lightning makes after a step, if the step was dropped.

    Lightning steps its schedulers after every optimizer step and asks nobody. What they change is
    their own state and the hyperparameters of the parameter groups, so both are put back. Those
    that wait for a plateau it steps only once the batch is over.
    """

    def __init__(self) -> None:
        self._held: dict[Optimizer, _Held] = {}
        self._plateaus: dict[Any, _Plateau] = {}

    def hold(self, trainer: Trainer, optimizer: Optimizer, steps: int) -> None:
        """Remember where the schedules of ``optimizer`` stand.

        Args:
            trainer: The Trainer of the fit.
            optimizer: Whose step is dropped.
            steps: How many it has had that were not.
        """
        by_step, by_epoch = [], []
        automatic = trainer.lightning_module.automatic_optimization
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if scheduler.optimizer is not optimizer:
                continue
            state = copy.deepcopy(scheduler.state_dict())
            counts = config.interval == "step"
            if not automatic:  # nobody looks at the interval; one that counts epochs counts few
                counts = counts or 2 * scheduler.last_epoch >= steps
            if config.reduce_on_plateau and automatic:
                if counts and scheduler not in self._plateaus:
                    self._plateaus[scheduler] = _Plateau(scheduler, state, _rates(optimizer))
            elif counts:
                by_step.append((scheduler, state))
            elif "last_epoch" in state:
                by_epoch.append((scheduler, state))
        if by_step:
            groups = [(group, _hyperparameters(group)) for group in optimizer.param_groups]
            self._held[optimizer] = _Held(by_step, by_epoch, groups)

    def release_plateaus(self) -> None:
        """The same for those that wait for a plateau, once Lightning has stepped them."""
        waiting, self._plateaus = self._plateaus, {}
        for held in waiting.values():
            held.put_back()

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


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        group[name].copy_(value)
    else:
        group[name] = value


def _rates(optimizer: Optimizer) -> list[tuple[dict[str, Any], Any]]:
    return [(group, _hyperparameters(group)["lr"]) for group in optimizer.param_groups]


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }
