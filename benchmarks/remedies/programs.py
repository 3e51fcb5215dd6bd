"""A training program, with the places where a remedy can change it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.remedies.tasks import Task
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.measure.model_facts import model_facts
from lightning_gradguard.readings import ModelFacts
from lightning_gradguard.record import Recorder

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


@dataclass
class Program:
    """What is trained, and how.

    Attributes:
        model: Takes a batch of inputs, returns logits.
        make_optimizer: Makes the optimizer from parameters.
        task: What is learned.
        trained: What of the model is given to the optimizer; all of it if `None`.
        autocast: Dtype of the mixed precision.
        scale_loss: Whether a GradScaler is used.
        loss_factor: What the loss is multiplied by.
        guarded: Whether a `GuardEngine` protects the run.
        line: A remedy's line that makes or changes the optimizer.
        input_line: A remedy's line that changes `inputs`.
    """

    model: nn.Module
    make_optimizer: MakeOptimizer
    task: Task
    trained: nn.Module | None = None
    autocast: torch.dtype | None = None
    scale_loss: bool = False
    loss_factor: float = 1.0
    guarded: bool = False
    line: str = ""
    input_line: str = ""
    scope: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scope = {"torch": torch, "model": self.model}

    @property
    def facts(self) -> ModelFacts:
        """What remedies are chosen by."""
        return model_facts(self.model, self.make_optimizer(self.model.parameters()))

    def run_on_model(self, line: str) -> None:
        """Runs a remedy's line that changes the model."""
        exec(line, self.scope)

    def to(self, device: str) -> None:
        """Moves the model."""
        self.model.to(device)


def train(program: Program, steps: int, seed: int, device: str = "cpu") -> float:
    """Trains and returns the accuracy on the examples that judge, in percent."""
    program.to(device)
    optimizer = program.make_optimizer((program.trained or program.model).parameters())
    scope = {**program.scope, "optimizer": optimizer}
    if program.line:
        exec(program.line, scope)
    optimizer, scheduler = scope["optimizer"], scope.get("scheduler")
    scaler = torch.amp.GradScaler(device, enabled=program.scale_loss)
    guard = _guard(program, optimizer) if program.guarded else None
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs, labels = (t.to(device) for t in program.task.draw(generator))
        optimizer.zero_grad()
        with _precision(program, device):
            logits = program.model(_prepared(program, inputs))
            loss = nn.functional.cross_entropy(logits.float(), labels) * program.loss_factor
        scaler.scale(loss).backward()
        if guard is not None:
            guard.before_step(loss)
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
    if guard is not None:
        guard.close()
    return accuracy(program, device)


@torch.no_grad()
def accuracy(program: Program, device: str = "cpu") -> float:
    """Percent of the judging examples that are classified right; NaN logits are wrong."""
    inputs, labels = (t.to(device) for t in program.task.judge)
    program.model.eval()
    logits = program.model(_prepared(program, inputs))
    right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
    return 100.0 * float(right.float().mean())


def _prepared(program: Program, inputs: Tensor) -> Tensor:
    if not program.input_line:
        return inputs
    scope: dict[str, Any] = {"torch": torch, "inputs": inputs}
    exec(program.input_line, scope)
    prepared: Tensor = scope["inputs"]
    return prepared


def _precision(program: Program, device: str) -> contextlib.AbstractContextManager[Any]:
    if program.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=program.autocast)


def _guard(program: Program, optimizer: Optimizer) -> GuardEngine:
    logging.getLogger("lightning_gradguard").setLevel(logging.CRITICAL)
    return GuardEngine(program.model, optimizer, timesteps=None, recorder=Recorder(silent=True))
