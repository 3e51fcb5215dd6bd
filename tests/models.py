"""Small modules to train, their data, and the plain loop that each run is compared with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard
from lightning_gradguard.respond import UpdateCap

Batch = tuple[Tensor, Tensor]

INPUTS = 6
# Float32 norms of a few hundred elements, each summed in another order than the reference's.
NORM_TOLERANCE = 2e-6


def make_batches(count: int, size: int = 8, *, poisoned: Collection[int] = ()) -> list[Batch]:
    """Batches of a fixed linear task with noise; the inputs of the poisoned ones hold a NaN."""
    generator = torch.Generator().manual_seed(7)
    slopes = torch.randn(INPUTS, 1, generator=generator)
    batches = []
    for number in range(count):
        inputs = torch.randn(size, INPUTS, generator=generator)
        targets = inputs @ slopes + 0.1 * torch.randn(size, 1, generator=generator)
        if number in poisoned:
            inputs[0, 0] = math.nan
        batches.append((inputs, targets))
    return batches


def loader(batches: Sequence[Any]) -> DataLoader[Any]:
    """Batches as they are, in order."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


class Regression(LightningModule):
    """Two layers and a loss; the same weights each time it is made.

    Args:
        optimizer: Makes the optimizer from the parameters.
        dropout: Above 0 it takes random numbers at each step.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Linear(16, 1)
        self.make_optimizer = optimizer or adamw

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self(inputs).float(), targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class WithValidation(Regression):
    """The same with a validation loss."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def adamw(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def fused_adamw(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def sgd(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=5e-2, momentum=0.9)


def fused_sgd(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=5e-2, momentum=0.9, fused=True)


def quiet_trainer(root: Any, *callbacks: Callback, **arguments: Any) -> Trainer:
    """A Trainer on one CPU process that prints nothing and writes below ``root`` only."""
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**settings, **arguments})


def guard_without(**parts: Any) -> GradGuard:
    """A guard with only the named responses on, so that a plain loop can do the same."""
    off = dict.fromkeys(("clip", "cap", "skip", "backoff", "rollback"))
    return GradGuard(**{**off, **parts})


def fixed_cap(ratio: float) -> UpdateCap:
    """A cap that stays where it is."""
    return UpdateCap(max_ratio=ratio, start_ratio=ratio, min_ratio=ratio, adaptive=False)


# -- the plain computation ------------------------------------------------------------------------


def total_norm(parameters: Iterable[Tensor]) -> float:
    """The norm of all gradients by its definition, in double precision."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return math.sqrt(sum(g.double().square().sum().item() for g in grads))


@dataclass
class PlainRun:
    """What a plain loop saw; the model it was given holds the weights."""

    optimizer: Optimizer
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def plain_loop(
    model: Any,
    batches: Sequence[Batch],
    *,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    omit: Collection[int] = (),
    before_update: Callable[[int, float], None] | None = None,
    update: Callable[[Optimizer], None] = lambda optimizer: optimizer.step(),
) -> PlainRun:
    """Train without Lightning and without the guard.

    Args:
        model: Has ``loss(batch)`` and ``configure_optimizers()``.
        batches: One for each micro-batch.
        accumulate: Micro-batches in a step.
        autocast: Dtype of the mixed precision.
        omit: Steps whose update is left out.
        before_update: Called with the step and its gradient norm; may change gradients.
        update: Takes the step.
    """
    optimizer = model.configure_optimizers()
    run = PlainRun(optimizer)
    model.train()
    for step, start in enumerate(range(0, len(batches), accumulate)):
        optimizer.zero_grad()
        loss_of_step = 0.0
        for batch in batches[start : start + accumulate]:
            context = (
                torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
            )
            with context:
                loss = model.loss(batch) / accumulate
            loss.backward()
            loss_of_step += loss.item()
        run.losses.append(loss_of_step)
        run.norms.append(total_norm(model.parameters()))
        if step in omit:
            continue
        if before_update is not None:
            before_update(step, run.norms[-1])
        update(optimizer)
    return run


# -- comparison -----------------------------------------------------------------------------------


def assert_same_bits(actual: Any, expected: Any, where: str = "value") -> None:
    """Nested values are equal, tensors bit for bit (a NaN equals itself)."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        torch.testing.assert_close(
            actual.detach(),
            expected.detach(),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m: f"{where}: {m}",
        )
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_same_bits(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(one, other, f"{where}[{number}]")
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(actual), where
    else:
        assert actual == expected, f"{where}: {actual!r} != {expected!r}"


def assert_untouched(optimizer: Optimizer, rate: float) -> None:
    """Nothing of the guard's is left on the optimizer."""
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    assert [group["lr"] for group in optimizer.param_groups] == [rate] * len(optimizer.param_groups)
