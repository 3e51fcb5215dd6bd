"""Pictures and numbers reach real loggers, each read back with its own reader."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradguard import GradGuard
from lightning_gradguard.record.logger_images import log_images
from lightning_gradguard.record.pictures import heat_maps
from tests.models import Regression, loader, make_batches, quiet_trainer
from tests.record.runs import made_up_run

KEYS = {
    "grad_norm/total",
    "grad_norm/total_clipped",
    "grad_norm/body.0",
    "grad_norm/head",
    "gradguard/clip_coef",
    "gradguard/lr_scale",
    "gradguard/skipped_steps",
}
KEY = "grad_norm/heat_map"
STEP = 20


class Numbers(Logger):
    """A user's own: it has nothing but ``log_metrics``."""

    name = version = "mine"

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, float] = {}

    def log_metrics(self, metrics, step=None):
        self.logged.update(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.fixture(scope="module")
def picture():
    return heat_maps(made_up_run().optimizers[0])[KEY]


def fit(root, logger):
    trainer = quiet_trainer(root, GradGuard(), logger=logger, log_every_n_steps=5)
    trainer.fit(Regression(), loader(make_batches(STEP)))
    return trainer


def test_tensorboard_takes_numbers_and_pictures(tmp_path, picture):
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(tmp_path, logger)
    assert log_images(logger, {KEY: picture}, STEP) is True
    logger.experiment.flush()

    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    total = events.Scalars("grad_norm/total")[-1]
    assert total.step == STEP - 1
    assert total.value == pytest.approx(trainer.callbacks[0].history[-1].total_norm)
    (*_, shown) = events.Images(KEY)
    assert shown.step == STEP
    read = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    np.testing.assert_array_equal(read, picture)


@pytest.mark.slow
def test_mlflow_takes_numbers_and_pictures(tmp_path, monkeypatch, picture):
    # Of its stores, that of files is the one that mlflow-skinny has without SQLAlchemy.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    trainer = fit(tmp_path, logger)
    assert log_images(logger, {KEY: picture}, STEP) is True

    client, run = logger.experiment, logger.run_id
    assert set(client.get_run(run).data.metrics) >= KEYS
    history = client.get_metric_history(run, "grad_norm/total")
    assert [metric.step for metric in history] == [4, 9, 14, 19]
    assert history[-1].value == pytest.approx(trainer.callbacks[0].history[-1].total_norm)
    files = [f.path for f in client.list_artifacts(run, "images")]
    drawn = [f for f in files if f.endswith(".png") and "grad_norm" in f and "heat_map" in f]
    (path,) = [f for f in drawn if f"+step+{STEP}+" in f][-1:]
    read = np.asarray(Image.open(client.download_artifacts(run, path)))
    np.testing.assert_array_equal(read, picture)


def test_csv_takes_the_numbers_alone(tmp_path, picture):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, logger)
    assert log_images(logger, {KEY: picture}, STEP) is False

    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        assert set(csv.DictReader(file).fieldnames or ()) >= KEYS


def test_a_logger_that_only_has_log_metrics_takes_the_numbers(tmp_path, picture):
    logger = Numbers()
    trainer = fit(tmp_path, logger)
    assert log_images(logger, {KEY: picture}, STEP) is False

    assert set(logger.logged) >= KEYS
    last = trainer.callbacks[0].history[-1]
    assert logger.logged["grad_norm/total"] == pytest.approx(last.total_norm)


def test_several_loggers_each_take_what_they_can(tmp_path):
    loggers = [CSVLogger(tmp_path), Numbers(), TensorBoardLogger(tmp_path)]
    fit(tmp_path, loggers)

    assert set(loggers[1].logged) >= KEYS
    assert set(EventAccumulator(loggers[2].log_dir).Reload().Tags()["scalars"]) >= KEYS


def test_without_a_logger_nothing_happens(tmp_path, picture):
    trainer = fit(tmp_path, False)

    assert trainer.callback_metrics.keys() >= KEYS
    assert log_images(None, {KEY: picture}, STEP) is False


def test_wandb_is_left_to_who_knows_it_better(picture):
    taken = []
    run = SimpleNamespace(alert=print, add_image=taken.append, log_image=taken.append)

    assert log_images(SimpleNamespace(experiment=run, run_id="1"), {KEY: picture}, STEP) is False
    assert log_images(DummyLogger(), {KEY: picture}, STEP) is False  # which has every method
    assert taken == []


def test_what_a_logger_raises_is_the_callers(picture):
    def add_image(*args, **kwargs):
        raise OSError("disk full")

    logger = SimpleNamespace(experiment=SimpleNamespace(add_image=add_image))
    with pytest.raises(OSError, match="disk full"):
        log_images(logger, {KEY: picture}, STEP)
    assert log_images(logger, {}, STEP) is True  # whether it would take any
