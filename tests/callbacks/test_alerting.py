"""People are told of a real run, and the run does not notice."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_gradguard import GradGuard
from lightning_gradguard.record import Alert, GradientAlert, wandb_runs
from lightning_gradguard.respond import SkipBadSteps
from tests.engines.test_ddp import both_ranks
from tests.models import (
    Regression,
    assert_same_bits,
    loader,
    make_batches,
    quiet_trainer,
)
from tests.record.wandb_log import finished, offline, read_log

BATCHES = 60
# The second comes after the first has healed, so that it is another finding.
POISONED = (5, 50)
NON_FINITE = "GradGuard: NaN or Inf in training"


def fit(root: Path, guard: Callback, poisoned: Any = POISONED, **options: Any) -> Trainer:
    trainer = quiet_trainer(root, guard, **options)
    trainer.fit(Regression(), loader(make_batches(BATCHES, poisoned=poisoned)))
    return trainer


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gradguard-alerts"]


# -- a callable -----------------------------------------------------------------------------------


def test_a_finding_of_a_run_is_told_with_its_remedy(tmp_path):
    told: list[Alert] = []
    guard = GradGuard(alert=GradientAlert(send=told.append))
    fit(tmp_path, guard)
    (alert,) = told
    assert (alert.title, alert.level) == (NON_FINITE, "critical")
    assert alert.finding is not None
    assert alert.finding.step == POISONED[0]
    assert alert.finding.remedies[0].sentence in alert.text
    assert alert.finding.remedies[0].code in alert.text
    assert threads() == []


def test_the_second_of_a_title_is_told_once_its_time_has_come(tmp_path, caplog):
    told: list[Alert] = []
    fit(tmp_path, GradGuard(alert=GradientAlert(send=told.append, every_seconds=0)))
    assert [alert.finding.step for alert in told] == list(POISONED)
    with caplog.at_level(logging.INFO, logger="lightning_gradguard"):
        fit(tmp_path, GradGuard(alert=GradientAlert(send=told.append)))
    assert len(told) == 3
    assert "held back: 1" in caplog.text


def test_a_stop_is_told(tmp_path):
    told: list[Alert] = []
    skip, alert = SkipBadSteps(max_consecutive=3), GradientAlert(send=told.append)
    guard = GradGuard(skip=skip, alert=alert, rollback=None)
    trainer = fit(tmp_path, guard, poisoned=range(5, BATCHES))
    assert trainer.global_step < BATCHES
    assert [alert.title for alert in told] == [NON_FINITE, "GradGuard: run is stopped"]


def test_a_healthy_run_alerts_nobody(tmp_path):
    told: list[Alert] = []
    fit(tmp_path, GradGuard(alert=GradientAlert(send=told.append)), poisoned=())
    assert told == []


def test_a_trial_run_alerts_nobody(tmp_path):
    told: list[Alert] = []
    guard = GradGuard(alert=GradientAlert(send=told.append))
    fit(tmp_path, guard, range(4), fast_dev_run=4)
    assert guard.findings
    assert told == []


def test_every_fit_counts_anew(tmp_path):
    told: list[Alert] = []
    guard = GradGuard(alert=GradientAlert(send=told.append))
    for number in (1, 2):
        fit(tmp_path, guard)
        assert len(told) == number


# The batches follow from the number of the step, not from the loader.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resumed_run_does_not_tell_again_what_was_open(tmp_path):
    told: list[Alert] = []
    trainer = fit(tmp_path, GradGuard(alert=GradientAlert(send=told.append)), (5,), max_steps=8)
    assert len(told) == 1
    path = tmp_path / "open.ckpt"
    trainer.save_checkpoint(path)
    guard = GradGuard(alert=GradientAlert(send=told.append))
    resumed = quiet_trainer(tmp_path, guard, max_steps=40, max_epochs=5)
    resumed.fit(Regression(), loader(make_batches(BATCHES)), ckpt_path=path, weights_only=True)
    assert [f.until is not None for f in guard.findings] == [True], "it was not open any more"
    assert len(told) == 1


# -- a callable that does harm --------------------------------------------------------------------


class Hanging:
    """A receiver that does not come back until it is released."""

    def __init__(self) -> None:
        self.calls = 0
        self.release = threading.Event()

    def __call__(self, alert: Alert) -> None:
        self.calls += 1
        self.release.wait()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    receiver = Hanging()
    yield receiver
    receiver.release.set()


class LastBatch(Callback):
    """Notes when training itself was over."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.at = time.monotonic()


def test_a_hanging_receiver_costs_a_run_at_most_the_timeout_at_its_end(tmp_path, hanging, caplog):
    guard = GradGuard(alert=GradientAlert(send=hanging, every_seconds=0))
    last = LastBatch()
    trainer = fit(tmp_path, guard, callbacks=[guard, last])
    after = time.monotonic() - last.at
    # every batch was trained while the first alert was still on its way
    assert trainer.global_step == BATCHES
    assert hanging.calls == 1
    assert not hanging.release.is_set()
    assert 2.0 <= after < 2.0 + 1.5, "it was waited for more than once, or not at all"
    assert "not delivered within 2 s: 2" in caplog.text


def test_a_failing_receiver_changes_no_bit_of_training(tmp_path, caplog):
    def fails(alert: Alert) -> None:
        raise ConnectionError("no route to host")

    models = []
    for alert in (None, GradientAlert(send=fails, every_seconds=0)):
        guard, model = GradGuard(alert=alert), Regression()
        quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(BATCHES, poisoned=POISONED)))
        models.append(model.state_dict())
        assert len(guard.history) == BATCHES, "the guard was turned off with it"
    assert_same_bits(models[1], models[0])
    (record,) = [r for r in caplog.records if r.exc_info]
    assert "no longer sent by" in record.getMessage()


def test_what_was_found_before_a_run_broke_off_is_told(tmp_path):
    told: list[Alert] = []

    class BreaksOff(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step > POISONED[0]:
                raise FloatingPointError("loss is NaN")

    guard = GradGuard(alert=GradientAlert(send=told.append))
    with pytest.raises(FloatingPointError):
        fit(tmp_path, guard, callbacks=[guard, BreaksOff()])
    assert [alert.title for alert in told] == [NON_FINITE]
    assert threads() == []


class FailsToLog(GradGuard):
    """A guard that gives up at the first step that is logged."""

    def _log_step(self, *args: Any) -> None:
        raise RuntimeError("a fault of the guard")


def test_a_guard_that_gives_up_has_told_what_it_had_found(tmp_path):
    told: list[Alert] = []
    guard = FailsToLog(alert=GradientAlert(send=told.append, every_seconds=0))
    fit(tmp_path, guard, log_every_n_steps=10)
    assert guard.broken
    assert [alert.title for alert in told] == [NON_FINITE]
    assert threads() == []
    assert guard.engines[0].recorder.listeners == []


@pytest.mark.parametrize("alert", [True, "wandb", {"log": True}])
def test_what_is_no_setting_is_refused(alert):
    with pytest.raises(TypeError, match="alert must be a GradientAlert or None"):
        GradGuard(alert=alert)


# As Lightning's CLI does it, which still calls what jsonargparse has deprecated.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_configuration_can_hold_the_settings():
    settings = {"min_severity": "critical", "actions": ["stop"], "send": "builtins.print"}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GradGuard, "guard")
    guard = parser.instantiate_classes(parser.parse_object({"guard": {"alert": settings}})).guard
    assert guard.alert == GradientAlert(print, "critical", ("stop",))


# -- loggers --------------------------------------------------------------------------------------


def test_the_log_line_is_there_if_asked_for(tmp_path, caplog):
    for log in (False, True):
        fit(tmp_path, GradGuard(alert=GradientAlert(log=log)))
        records = [r for r in caplog.records if r.name == "lightning_gradguard.alerts"]
        assert [NON_FINITE in r.getMessage() for r in records] == [True] * log


def test_other_loggers_are_left_alone(tmp_path):
    trainer = fit(tmp_path, GradGuard(), logger=CSVLogger(tmp_path))
    assert wandb_runs(trainer.loggers) == []
    assert threads() == []


def test_a_logger_without_a_run_is_said_and_goes_without(tmp_path, caplog):
    class Broken(CSVLogger):
        broken = False

        @property
        def experiment(self) -> Any:
            if self.broken:
                raise ConnectionError("no server")
            return super().experiment

    trainer = quiet_trainer(tmp_path, logger=Broken(tmp_path))
    trainer.logger.broken = True
    assert wandb_runs(trainer.loggers) == []
    assert "Broken gets no alerts: no server" in caplog.text


@pytest.fixture
def wandb(tmp_path: Path) -> Iterator[Any]:
    with offline(tmp_path) as module:
        yield module


@pytest.mark.slow
def test_the_default_reaches_wandbs_own_record_of_the_run(tmp_path, wandb, caplog):
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(offline=True, save_dir=tmp_path)
    guard = GradGuard()
    trainer = fit(tmp_path, guard, logger=logger)
    assert [id(run) for run in wandb_runs(trainer.loggers)] == [id(logger.experiment)]
    ((title, text, level),) = read_log(finished(wandb, tmp_path)).alerts
    assert (title, level) == (NON_FINITE, "ERROR")
    assert guard.findings[0].remedies[0].sentence in text
    assert "no longer sent" not in caplog.text


@pytest.mark.slow
def test_wandb_is_not_told_if_not_wanted(tmp_path, wandb):
    from lightning.pytorch.loggers import WandbLogger

    fit(tmp_path, GradGuard(alert=None), logger=WandbLogger(offline=True, save_dir=tmp_path))
    assert read_log(finished(wandb, tmp_path)).alerts == []


# -- ranks ----------------------------------------------------------------------------------------


def alerts_on_this_rank(root: str) -> dict[str, Any]:
    told: list[Alert] = []
    guard = GradGuard(alert=GradientAlert(send=told.append))
    trainer = quiet_trainer(root, guard, devices=2, strategy="ddp", use_distributed_sampler=False)
    trainer.fit(Regression(), loader(make_batches(12, poisoned=(3,))))
    return {"titles": [alert.title for alert in told], "findings": len(guard.findings)}


@pytest.mark.slow
def test_of_several_ranks_one_tells(tmp_path):
    ((first, second),) = both_ranks(alerts_on_this_rank, tmp_path, ())
    assert first["titles"] == [NON_FINITE]
    assert second["titles"] == []
    assert second["findings"] == first["findings"] == 1
