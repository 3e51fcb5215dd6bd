"""Runs with little or nothing to guard: they work, or one sentence says what does not."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_gradguard import GradGuard, GradientMonitor, GuardEngine
from lightning_gradguard.respond import SkipBadSteps
from tests.models import (
    NORM_TOLERANCE,
    Batch,
    Regression,
    adamw,
    assert_same_bits,
    fused_adamw,
    guard_without,
    loader,
    make_batches,
    plain_loop,
    quiet_trainer,
)

GUARDS = pytest.mark.parametrize(
    "make_guard",
    [GradGuard, GradientMonitor, lambda: GradGuard("observe")],
    ids=["guard", "monitor", "observe"],
)


def no_complaint(caplog: pytest.LogCaptureFixture) -> bool:
    return not [r for r in caplog.records if r.name == "lightning_gradguard"]


@GUARDS
@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned `None`:UserWarning")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_model_without_parameters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_guard: Any
) -> None:
    class Empty(LightningModule):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    guard = make_guard()
    quiet_trainer(tmp_path, guard).fit(Empty(), loader(make_batches(3)))
    assert guard.history == []
    assert no_complaint(caplog)
    assert "No finding" in str(guard.report())


@GUARDS
def test_no_optimizer(tmp_path: Path, caplog: pytest.LogCaptureFixture, make_guard: Any) -> None:
    class Untrained(Regression):
        def configure_optimizers(self) -> None:
            return None

    guard, model = make_guard(), Untrained()
    with pytest.warns(UserWarning, match="returned `None`"):
        quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(3)))
    assert guard.history == []
    assert no_complaint(caplog)
    assert_same_bits(model.state_dict(), Regression().state_dict())


@GUARDS
@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_all_frozen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_guard: Any, make_optimizer: Any
) -> None:
    """The loss has a gradient, but not for anything the optimizer holds."""

    class Frozen(Regression):
        def __init__(self) -> None:
            super().__init__(make_optimizer)
            for parameter in self.parameters():
                parameter.requires_grad_(False)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.loss((batch[0].requires_grad_(), batch[1]))

    guard, model = make_guard(), Frozen()
    quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(3)))
    assert guard.history == []
    assert no_complaint(caplog)
    assert_same_bits(model.state_dict(), Regression().state_dict())


@GUARDS
def test_all_gradients_none_on_some_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_guard: Any
) -> None:
    class SometimesUnused(Regression):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if batch_idx % 2:
                return self.loss(batch)
            return batch[0].requires_grad_().sum()

    guard, model = make_guard(), SometimesUnused()
    quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(8)))
    plain = Regression()
    run = plain_loop(plain, make_batches(8)[1::2])
    assert guard.active if isinstance(guard, GuardEngine) else not guard.broken
    assert len(guard.history) == 4
    assert guard.history[0].total_norm == pytest.approx(run.norms[0], rel=NORM_TOLERANCE)
    assert no_complaint(caplog)


def test_a_parameter_that_never_gets_a_gradient(tmp_path: Path) -> None:
    class Unused(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 3)

    guard, batches = GradGuard(), make_batches(6)
    quiet_trainer(tmp_path, guard).fit(Unused(), loader(batches))
    with_less = GradGuard()
    quiet_trainer(tmp_path, with_less).fit(Regression(), loader(batches))
    assert guard.history == with_less.history


@GUARDS
@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_loss_of_none_is_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_guard: Any, make_optimizer: Any
) -> None:
    class Skipping(Regression):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return None if batch_idx in (0, 3) else self.loss(batch)

    guard, model = make_guard(), Skipping(make_optimizer)
    if isinstance(guard, GradGuard):
        guard = guard_without(skip=SkipBadSteps())
    quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(8)))
    plain = Regression(make_optimizer)
    kept = [batch for number, batch in enumerate(make_batches(8)) if number not in (0, 3)]
    run = plain_loop(plain, kept)
    assert [row.total_norm for row in guard.history] == pytest.approx(run.norms, rel=NORM_TOLERANCE)
    assert [row.loss for row in guard.history] == pytest.approx(run.losses, rel=1e-6)
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert no_complaint(caplog)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_loss_of_none_within_an_accumulation_window(tmp_path: Path) -> None:
    class Skipping(Regression):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return None if batch_idx in (0, 1, 3) else self.loss(batch)

    guard, model = guard_without(skip=SkipBadSteps()), Skipping()
    reference = Skipping()
    batches = make_batches(8)
    quiet_trainer(tmp_path, guard, accumulate_grad_batches=2).fit(model, loader(batches))
    quiet_trainer(tmp_path, accumulate_grad_batches=2).fit(reference, loader(batches))
    assert_same_bits(model.state_dict(), reference.state_dict())
    assert not guard.broken
    assert all(math.isfinite(row.total_norm) for row in guard.history)


@GUARDS
def test_no_logger(tmp_path: Path, caplog: pytest.LogCaptureFixture, make_guard: Any) -> None:
    guard = make_guard()
    trainer = quiet_trainer(tmp_path, guard, logger=False, log_every_n_steps=1)
    trainer.fit(Regression(), loader(make_batches(5)))
    assert trainer.logged_metrics["grad_norm/total"].item() == pytest.approx(
        guard.history[-1].total_norm
    )
    assert no_complaint(caplog)


@GUARDS
def test_lbfgs_is_left_alone_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_guard: Any
) -> None:
    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    guard, model, bare = make_guard(), Regression(lbfgs), Regression(lbfgs)
    quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(4)))
    quiet_trainer(tmp_path).fit(bare, loader(make_batches(4)))
    assert_same_bits(model.state_dict(), bare.state_dict())
    (record,) = [r for r in caplog.records if r.name == "lightning_gradguard"]
    assert record.levelno == logging.WARNING
    assert "LBFGS" in record.getMessage()


def test_an_engine_for_lbfgs_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="got LBFGS"):
        GuardEngine(model, torch.optim.LBFGS(model.parameters()))


def test_empty_parameters(tmp_path: Path) -> None:
    """A tensor without elements has a norm of zero and nothing to cap."""

    class WithEmpty(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0))

        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch) + self.empty.sum()

    guard, batches = GradGuard(), make_batches(6)
    quiet_trainer(tmp_path, guard).fit(WithEmpty(), loader(batches))
    without = GradGuard()
    quiet_trainer(tmp_path, without).fit(Regression(), loader(batches))
    assert not guard.broken
    assert guard.history == without.history


def test_a_zero_learning_rate_and_a_zero_gradient(tmp_path: Path) -> None:
    def still(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9)

    class Flat(Regression):
        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch) * 0.0

    for model in (Regression(still), Flat()):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        guard = GradGuard(backoff=None)
        quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(30)))
        assert guard.findings == []
        assert len(guard.history) == 30
        if not isinstance(model, Flat):  # AdamW's weight decay moves them
            assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_a_warm_up_from_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_optimizer: Any
) -> None:
    class WarmUp(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.parameters())
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20))
            return [optimizer], [{"scheduler": warm_up, "interval": "step"}]

    guard = GradGuard()
    quiet_trainer(tmp_path, guard).fit(WarmUp(make_optimizer), loader(make_batches(30)))
    assert guard.engines[0].step == 30
    assert len(guard.history) == 30
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_parameter_groups_added_during_the_run(tmp_path: Path) -> None:
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, idx: int) -> None:
            if idx == 4:
                trainer.optimizers[0].add_param_group({"params": pl_module.body.parameters()})

    def head_only(self: Regression) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=1e-2)

    class Growing(Regression):
        configure_optimizers = head_only

    guard, model = guard_without(skip=SkipBadSteps()), Growing()
    quiet_trainer(tmp_path, guard, Unfreeze()).fit(model, loader(make_batches(8)))
    plain = Growing()
    optimizer = plain.configure_optimizers()
    norms = []
    for number, batch in enumerate(make_batches(8)):
        if number == 4:
            optimizer.add_param_group({"params": plain.body.parameters()})
        optimizer.zero_grad()
        plain.loss(batch).backward()
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(grads).norm().item())
        optimizer.step()
    assert [row.total_norm for row in guard.history] == pytest.approx(norms, rel=1e-5)
    assert_same_bits(model.state_dict(), plain.state_dict())
