"""The surroundings of a step that is done again: precision, modes, and a Trainer to ask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_gradguard.dry_run.training_loss import Silence
from lightning_gradguard.measure import clean_name

_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


class PastTrainer(Silence):
    """Stands for the Trainer of the step; knows its numbers and does nothing.

    Args:
        facts: What was written down of the run.

    Example:
        >>> trainer = PastTrainer({"global_step": 412})
        >>> trainer.global_step, trainer.training, trainer.logger.experiment.log("x") is not None
        (412, True, True)
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.current_epoch = facts.get("epoch", 0)
        self.global_step = facts.get("global_step", 0)
        self.max_epochs = facts.get("max_epochs")
        self.max_steps = facts.get("max_steps", -1)
        self.global_rank = self.local_rank = 0
        self.world_size = self.num_nodes = self.num_devices = 1
        self.accumulate_grad_batches = facts.get("accumulate_grad_batches", 1)
        self.is_global_zero = self.training = True
        self.validating = self.testing = self.predicting = self.evaluating = False
        self.sanity_checking = self.fast_dev_run = self.should_stop = self.is_last_batch = False
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []


@contextlib.contextmanager
def in_precision(name: str, device: torch.device) -> Iterator[None]:
    """Compute as a Trainer of this precision does."""
    if name in _AUTOCAST:
        with torch.autocast(device.type, dtype=_AUTOCAST[name]):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(_TRUE.get(name, before))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def knows_precision(name: str) -> bool:
    """Whether `in_precision` can do it; what is not known counts as that of the weights."""
    return name in ("", "32-true", *_AUTOCAST, *_TRUE)


def set_modes(module: nn.Module, described: Mapping[str, Any]) -> None:
    """Put parts into eval mode and freeze parameters as they were in the run."""
    module.train()
    evaluating, frozen = set(described["evaluating"]), set(described["frozen"])
    for name, part in module.named_modules():
        if clean_name(name) in evaluating:
            part.training = False
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(clean_name(name) not in frozen)


def attach(module: nn.Module, trainer: PastTrainer) -> None:
    """Let a LightningModule that has no Trainer find this one."""
    for part in module.modules():
        attributes = vars(part)
        if "_trainer" in attributes and attributes["_trainer"] is None:
            attributes["_trainer"] = trainer
