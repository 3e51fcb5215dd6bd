"""A preflight beside a Trainer: the same training, and nothing logged."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_gradguard.dry_run import preflight
from lightning_gradguard.dry_run.training_loss import Silence
from tests.dry_run.models import CharacterModel, state_of, text_batches
from tests.models import assert_same_bits, loader, quiet_trainer


def fit(root: Path, model: LightningModule, *callbacks: Callback, **settings: Any) -> Trainer:
    trainer = quiet_trainer(root, *callbacks, log_every_n_steps=1, **settings)
    trainer.fit(model, loader(text_batches(6)))
    return trainer


def outcome(trainer: Trainer, model: CharacterModel) -> dict[str, Any]:
    return {
        "state": state_of(model, identity=False),
        "optimizer": trainer.optimizers[0].state_dict(),
        "metrics": dict(trainer.callback_metrics),
        "generator": model.generator.get_state(),
        "history": model.history,
    }


class InFit(Callback):
    """A preflight with the current batch, before some of the steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.results: list[Any] = []
        self.metrics: list[tuple[Any, Any]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx in self.steps:
            before = dict(trainer.callback_metrics), dict(trainer.progress_bar_metrics)
            self.results.append(preflight(pl_module, batch, verbose=False))
            after = dict(trainer.callback_metrics), dict(trainer.progress_bar_metrics)
            self.metrics.append((before, after))


def seeded() -> CharacterModel:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return CharacterModel()


def test_training_after_it_is_training_without_it(tmp_path: Path) -> None:
    plain = seeded()
    expected = outcome(fit(tmp_path, plain), plain)
    model = seeded()
    preflight(model, loader(text_batches(4)), verbose=False)
    assert_same_bits(outcome(fit(tmp_path, model), model), expected)


def test_inside_a_running_fit_nothing_changes_and_nothing_is_logged(tmp_path: Path) -> None:
    plain = seeded()
    expected = outcome(fit(tmp_path, plain, accumulate_grad_batches=2), plain)
    model, callback = seeded(), InFit(0, 3)  # 3: between the two halves of a step
    found = outcome(fit(tmp_path, model, callback, accumulate_grad_batches=2), model)
    assert_same_bits(found, expected)
    assert len(callback.results) == 2
    for before, after in callback.metrics:
        assert_same_bits(after, before)


def test_a_logger_that_the_step_writes_to_hears_nothing(tmp_path: Path) -> None:
    class Direct(CharacterModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            assert self.logger is not None
            self.logger.log_metrics({"direct": 1.0}, step=batch_idx)
            self.logger.experiment.metrics.append({"by hand": 1.0})
            return self.loss(batch)

    logger = CSVLogger(tmp_path)

    class Count(Callback):
        def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
            assert logger.experiment.metrics == []
            assert trainer.logger is logger

        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            assert len(logger.experiment.metrics) == 2

    callback = InFit(0)
    trainer = quiet_trainer(tmp_path, callback, Count(), logger=logger, max_steps=1)
    trainer.fit(Direct(), loader(text_batches(2)))
    assert len(callback.results) == 1


def test_the_silent_logger_takes_whatever_is_done_to_it() -> None:
    logger: Any = Silence()
    with logger.experiment.start_run(name="x") as run:
        run.config["rate"] = logger["rate"]
        run.log({"loss": 1.0})


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_runs_in_the_precision_of_the_trainer(tmp_path: Path, precision: Any) -> None:
    dtypes: list[torch.dtype] = []

    class Precise(CharacterModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            logits = self(batch[:, :-1])
            dtypes.append(logits.dtype)
            return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    callback = InFit(0)
    fit(tmp_path, Precise(), callback, precision=precision, max_steps=1)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert callback.results[0].time[0].decay_rate < 0


def test_a_module_of_the_other_namespace_is_served_as_well() -> None:
    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Tensor) -> Tensor:
            loss = self.layer(batch).sum()
            self.log("loss", loss)
            return loss

    model = Other()
    preflight(model, torch.ones(3, 2), verbose=False)
    assert "log" not in vars(model)


def test_the_trainer_of_a_wrapped_module_is_found(tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []

    class Inner(CharacterModel):
        def forward(self, letters: Tensor) -> Tensor:
            dtypes.append(
                torch.get_autocast_dtype("cpu")
                if torch.is_autocast_enabled("cpu")
                else torch.float32
            )
            return super().forward(letters)

    model = Inner()
    fit(tmp_path, model, precision="bf16-mixed", max_steps=1)
    wrapped = nn.Sequential(model)
    preflight(
        wrapped, text_batches(1)[0], loss=lambda m, x: m[0].training_step(x, 0), verbose=False
    )
    assert dtypes == [torch.bfloat16] * 2
