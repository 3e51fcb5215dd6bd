"""What reaches loggers, progress bar and other callbacks, against a hand-written computation."""

from __future__ import annotations

import logging
import math
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientMonitor

STEPS = 12


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
        self.total = torch.nn.Linear(4, 1)  # a name that could be taken for the total norm
        self.norms: list[float] = []

    def training_step(self, batch, batch_idx):
        return (self.total(self.encoder(batch[0])) - 1.0).square().mean()

    def on_before_optimizer_step(self, optimizer):
        # callbacks come before the module: these are the gradients that the guard left behind
        self.norms.append(math.sqrt(sum(p.grad.norm().item() ** 2 for p in self.parameters())))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Counts(Net):
    """Counts the keys that go through Lightning's ``log``, each of which takes its time."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(3, 4), *(torch.nn.Linear(4, 4) for _ in range(layers))
        )
        self.logged = 0

    def log(self, *args, **kwargs):
        self.logged += 1
        super().log(*args, **kwargs)


class KeepsCalls(Logger):
    name, version = "calls", 0

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        """Nothing of them is asked."""


def fit(callbacks, tmp_path, epochs=1, module=None, **options):
    module = module or Net()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"logger": False, "log_every_n_steps": 4, **options},
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(STEPS, 3))))
    return module, trainer


def own(caplog) -> list[str]:
    """What the guard itself said."""
    return [r.getMessage() for r in caplog.records if r.name == "lightning_gradguard"]


def test_norms_reach_the_logger_on_lightnings_own_schedule(tmp_path):
    module, _ = fit([GradientMonitor()], tmp_path, logger=CSVLogger(tmp_path))

    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    logged = {
        int(row["step"]): float(row["grad_norm/total"]) for row in rows if row["grad_norm/total"]
    }
    assert list(logged) == [3, 7, 11]
    for step, norm in logged.items():
        assert norm == pytest.approx(module.norms[step], rel=1e-6)


def test_layers_and_a_layer_called_total_keep_their_own_keys(tmp_path):
    _, trainer = fit([GradientMonitor()], tmp_path)
    _, shallow = fit([GradientMonitor(layer_depth=1)], tmp_path)

    assert {"grad_norm/total", "grad_norm/total_", "grad_norm/encoder.0"} <= set(
        trainer.callback_metrics
    )
    assert "grad_norm/encoder" in shallow.callback_metrics
    parts = [trainer.callback_metrics[f"grad_norm/{name}"] ** 2 for name in ("total_", "encoder.0")]
    total = trainer.callback_metrics["grad_norm/total"] ** 2
    torch.testing.assert_close(sum(parts), total)


def test_the_epochs_statistics_are_those_of_its_log_norms(tmp_path):
    module, trainer = fit([GradientMonitor()], tmp_path, epochs=2)

    logs = np.log(module.norms[STEPS:])  # the second epoch alone
    expected = {"log_mean": logs.mean(), "log_std": logs.std(), "log_max": logs.max()}
    for name, value in expected.items():
        assert trainer.callback_metrics[f"grad_norm/{name}"].item() == pytest.approx(
            value, rel=1e-4
        )


def test_keys_have_only_characters_that_every_logger_takes(tmp_path):
    _, trainer = fit([GradGuard()], tmp_path)

    assert "gradguard/lr_scale" in trainer.callback_metrics
    assert all(re.fullmatch(r"[A-Za-z0-9_./]+", key) for key in trainer.callback_metrics)


@pytest.mark.parametrize("key", ["total", "encoder.0"])
def test_other_callbacks_can_watch_the_norm(key, tmp_path):
    stop = EarlyStopping(f"grad_norm/{key}", stopping_threshold=1e9, check_on_train_epoch_end=True)
    _, trainer = fit([GradientMonitor(), stop], tmp_path, epochs=5)

    assert trainer.current_epoch < 5


def test_layers_reach_a_logger_in_one_call_at_the_steps_of_the_rest(tmp_path):
    logger = KeepsCalls()
    module, trainer = fit([GradientMonitor()], tmp_path, logger=logger)

    calls = [(step, row) for step, row in logger.calls if "grad_norm/encoder.0" in row]
    assert [step for step, _ in calls] == [3, 7, 11]
    assert [step for step, row in logger.calls if "grad_norm/total" in row][:3] == [3, 7, 11]
    for step, row in calls:
        assert row.keys() >= {"grad_norm/total_", "epoch"}
        both = math.hypot(row["grad_norm/encoder.0"], row["grad_norm/total_"])
        assert both == pytest.approx(module.norms[step], rel=1e-6)
    assert trainer.logged_metrics["grad_norm/total_"].item() == pytest.approx(
        calls[-1][1]["grad_norm/total_"]
    )


class Fails(KeepsCalls):
    """Its server is away for the rows of layers."""

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        if "grad_norm/encoder.0" in metrics:
            raise ConnectionError("no route to host")


def test_a_logger_that_fails_leaves_guard_and_other_loggers_alone(tmp_path, caplog):
    guard, fails, works = GradGuard(report=False), Fails(), KeepsCalls()
    with caplog.at_level(logging.WARNING, logger="lightning_gradguard"):
        fit([guard], tmp_path, logger=[fails, works])

    assert not guard.broken
    assert own(caplog) == ["Fails gets no more layers of the run: no route to host"]
    calls = [
        [step for step, row in one.calls if "grad_norm/total_" in row] for one in (fails, works)
    ]
    assert calls == [[3], [3, 7, 11]]


class OwnAxis(Net):
    """Decides what the loggers draw over, as Lightning lets a user do."""

    def training_step(self, batch, batch_idx):
        self.log("step", float(1000 + batch_idx))
        return super().training_step(batch, batch_idx)


def test_layers_are_logged_at_the_step_that_the_user_has_chosen(tmp_path):
    logger = KeepsCalls()
    fit([GradientMonitor()], tmp_path, module=OwnAxis(), logger=logger)

    for key in ("total", "encoder.0"):
        steps = [step for step, row in logger.calls if f"grad_norm/{key}" in row]
        assert steps[:3] == [1003, 1007, 1011]
    assert not any("epoch" in row for _, row in logger.calls if "grad_norm/encoder.0" in row)


class InTurns(Net):
    """Its second optimizer steps with every fourth batch only."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 4 == 3:
            second.step()
        self.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.encoder, self.total)]


def test_what_was_measured_once_is_logged_once(tmp_path):
    logger = KeepsCalls()
    fit([GradientMonitor()], tmp_path, module=InTurns(), logger=logger, log_every_n_steps=1)

    norms = [row[key] for _, row in logger.calls if (key := "grad_norm/optimizer1/total_") in row]
    assert len(norms) == len(set(norms)) == STEPS // 4


def test_log_dict_gets_no_more_keys_for_more_layers(tmp_path):
    counts = []
    for layers in (1, 30):
        model = Counts(layers)
        fit([GradGuard()], tmp_path, module=model)
        counts.append(model.logged)
    assert counts[0] == counts[1] > 0


def test_a_healthy_run_says_no_more_than_where_its_report_is(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_gradguard"):
        fit([GradGuard()], tmp_path)

    (message,) = own(caplog)
    assert message.endswith("report.html.")
    assert not list(tmp_path.rglob("events.jsonl"))


def test_without_history_and_report_it_says_and_writes_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_gradguard"):
        fit([GradGuard(history=False, report=False)], tmp_path)

    assert own(caplog) == []
    assert not list(tmp_path.rglob("gradguard"))


def test_the_users_own_clipping_is_named(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_gradguard"):
        fit([GradGuard(report=False)], tmp_path, gradient_clip_val=0.5)

    (message,) = own(caplog)
    assert "gradient_clip_val=0.5" in message
    assert "grad_norm/total_clipped" in message
