"""What is left behind by real runs: in every kind of logger, on disk, as a report."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from torch import nn

from lightning_gradguard import AdaptiveGradientClipping, GradGuard, GradientMonitor
from lightning_gradguard.callbacks import recording as recording_module
from lightning_gradguard.record import gallery as gallery_module
from lightning_gradguard.record import run_writer as run_writer_module
from lightning_gradguard.record.pictures import DrawingBudget
from lightning_gradguard.record.run_files import write_info
from lightning_gradguard.record.run_reader import read_run
from tests.engines.test_manual_optimization import Gan
from tests.models import (
    Batch,
    Regression,
    adamw,
    fused_adamw,
    loader,
    make_batches,
    quiet_trainer,
)

STEPS = 12


class OwnLogger(Logger):
    """As a user writes one who needs no more."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str | None:
        return None

    @property
    def version(self) -> str | None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(
    root: Path,
    guard: Any = None,
    model: LightningModule | None = None,
    *,
    steps: int = STEPS,
    poisoned: tuple[int, ...] = (),
    ckpt_path: str | None = None,
    **options: Any,
) -> Any:
    guard = guard or GradGuard()
    trainer = quiet_trainer(root, guard, **{"log_every_n_steps": 4, **options})
    trainer.fit(
        model or Regression(), loader(make_batches(steps, poisoned=poisoned)), ckpt_path=ckpt_path
    )
    return guard


# -- in each kind of logger -----------------------------------------------------------------------


def scalars_of_tensorboard(root: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "lightning_logs" / "version_0"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("grad_norm/total")}


def scalars_of_csv(root: Path) -> dict[int, float]:
    with (root / "lightning_logs/version_0/metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["grad_norm/total"]]
    return {int(row["step"]): float(row["grad_norm/total"]) for row in rows}


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (TensorBoardLogger, scalars_of_tensorboard),
        (CSVLogger, scalars_of_csv),
    ],
    ids=["tensorboard", "csv"],
)
def test_scalars_reach_the_logger(
    tmp_path: Path, make: Callable[[Path], Logger], read: Callable[[Path], dict[int, float]]
) -> None:
    guard = fit(tmp_path, logger=make(tmp_path))
    logged = read(tmp_path)
    assert logged == pytest.approx({step: guard.history[step].total_norm for step in (3, 7, 11)})


def test_a_logger_of_the_users_own_needs_no_more_than_log_metrics(tmp_path: Path) -> None:
    own = OwnLogger()
    guard = fit(tmp_path, logger=own)
    logged = {step: row["grad_norm/total"] for step, row in own.rows if "grad_norm/total" in row}
    assert logged == pytest.approx({step: guard.history[step].total_norm for step in (3, 7, 11)})
    assert not guard.broken
    assert len(read_run(tmp_path).optimizers[0].steps["step"]) == STEPS


class AtOnce(DrawingBudget):
    """Draws whenever there is something to draw."""

    def __init__(self) -> None:
        super().__init__(1.0, every_seconds=0.0, spacing=0.0)


def test_tensorboard_gets_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pytest.importorskip("matplotlib", reason="heat maps are drawn with matplotlib")
    fit(tmp_path, logger=TensorBoardLogger(str(tmp_path)))
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    (picture,) = events.Images("grad_norm/heat_map")
    assert (picture.width, picture.height) == (640, 360)
    assert picture.step == STEPS


def test_pictures_come_while_it_runs_within_their_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(gallery_module, "DrawingBudget", AtOnce)
    monkeypatch.setattr(
        gallery_module,
        "heat_maps",
        lambda part: drawn.append(len(part.steps["step"])) or {},  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(recording_module, "_FLUSH_EVERY_SECONDS", 0.0)
    fit(tmp_path, logger=TensorBoardLogger(str(tmp_path)))
    assert len(drawn) == 4  # of the three logged steps, and at the end
    assert drawn == sorted(drawn)
    assert drawn[-1] == STEPS


def test_mlflow_gets_scalars_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="its logger needs mlflow")
    # Its store in files, the only one of a small install, is there but for old runs.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log = MLFlowLogger("test", save_dir=str(tmp_path / "runs"))
    client, run = log.experiment, log.run_id
    guard = fit(tmp_path, logger=log)
    logged = {m.step: m.value for m in client.get_metric_history(run, "grad_norm/total")}
    assert logged == pytest.approx({step: guard.history[step].total_norm for step in (3, 7, 11)})
    pictures = [file.path for file in client.list_artifacts(run, "images")]
    assert any("grad_norm" in picture for picture in pictures)


class FailsToDraw(TensorBoardLogger):
    """Its server went away."""

    @property
    def experiment(self) -> Any:
        writer = super().experiment

        class Gone:
            def add_image(self, *args: Any, **kwargs: Any) -> None:
                raise ConnectionError("no route to host")

            def __getattr__(self, name: str) -> Any:
                return getattr(writer, name)

        return Gone()


def test_a_logger_that_fails_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = fit(tmp_path, logger=FailsToDraw(str(tmp_path)))
    assert not guard.broken
    said = [r.getMessage() for r in caplog.records if r.name == "lightning_gradguard"]
    assert said == ["FailsToDraw is shown no more of the run: no route to host"]
    assert (tmp_path / "lightning_logs/version_0/gradguard/report.html").exists()


def test_where_nothing_is_logged_and_no_place_is_named_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- on disk --------------------------------------------------------------------------------------


def test_the_history_is_what_the_guard_has_seen(tmp_path: Path) -> None:
    guard = fit(tmp_path, logger=CSVLogger(tmp_path), steps=40, poisoned=(20,))
    run = read_run(tmp_path / "lightning_logs" / "version_0")
    (part,) = run.optimizers
    norms = [row.total_norm for row in guard.history]
    np.testing.assert_allclose(part.steps["total_norm"], norms, rtol=1e-5)
    assert [int(step) for step in part.steps["step"][part.steps["skipped"] > 0]] == [20]
    assert part.layers.names == ("body.0", "head")
    assert list(part.layers.steps) == list(range(3, 40, 4))
    assert len(part.updates.steps)
    assert [finding.pathology for finding in run.findings] == [f.pathology for f in guard.findings]
    assert [action.step for action in part.actions] == [action.step for action in guard.actions]
    assert dict(part.counts) == guard.counts
    info = run.info
    assert (info.status, info.error, info.planned_steps) == ("finished", "", 40)
    assert info.model == "tests.models.Regression"
    assert info.parameters == sum(p.numel() for p in Regression().parameters())
    assert info.settings["GradGuard"]["cap"]["class"] == "UpdateCap"
    assert info.optimizers[0]["class"] == "AdamW"
    assert info.name == "lightning_logs/version_0"


def test_several_optimizers_have_a_part_each(tmp_path: Path) -> None:
    guard = fit(tmp_path, model=Gan())
    run = read_run(tmp_path)
    assert [part.label for part in run.optimizers] == ["optimizer0", "optimizer1"]
    for part, engine in zip(run.optimizers, guard.engines, strict=True):
        assert len(part.steps["step"]) == engine.step


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Lightning ignores further interrupts after the first one, in the whole process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Breaks(Regression):
    """Raises in the middle."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx == 6:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("a shape"), "failed", "ValueError: a shape"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_breaks_off_has_its_history_and_report(
    tmp_path: Path, error: BaseException, status: str, told: str
) -> None:
    model = Breaks()
    model.error = error
    with pytest.raises((type(error), SystemExit)):
        fit(tmp_path, model=model)
    run = read_run(tmp_path)
    assert (run.info.status, run.info.error) == (status, told)
    assert len(run.optimizers[0].steps["step"]) == 6
    report = (tmp_path / "gradguard/report.html").read_text(encoding="utf-8")
    assert told.split(":", maxsplit=1)[0] in report


RESUMES = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)


@RESUMES
def test_a_resumed_run_continues_and_another_fit_begins_anew(tmp_path: Path) -> None:
    keeps = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=STEPS)
    quiet_trainer(tmp_path, GradGuard(), keeps, enable_checkpointing=True).fit(
        Regression(), loader(make_batches(STEPS))
    )
    again = quiet_trainer(tmp_path, GradGuard(), keeps, enable_checkpointing=True, max_epochs=2)
    again.fit(
        Regression(), loader(make_batches(STEPS)), ckpt_path=str(tmp_path / "kept" / "last.ckpt")
    )
    steps = read_run(tmp_path).optimizers[0].steps["step"]
    assert list(steps) == list(range(2 * STEPS))
    fit(tmp_path, steps=5)
    assert list(read_run(tmp_path).optimizers[0].steps["step"]) == list(range(5))
    assert len(read_run(tmp_path / "gradguard/history-1").optimizers[0].steps["step"]) == 2 * STEPS


class LeavesOut(Regression):
    """Its head gets a gradient and is in no optimizer."""

    def configure_optimizers(self) -> Any:
        return adamw(self.body.parameters())


@RESUMES
def test_a_run_resumed_elsewhere_takes_its_open_findings_along(tmp_path: Path) -> None:
    first = LeavesOut()
    keeps = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=STEPS)
    guard = GradientMonitor()
    quiet_trainer(tmp_path / "a", guard, keeps, enable_checkpointing=True).fit(
        first, loader(make_batches(STEPS))
    )
    open_ones = [finding.cause for finding in guard.findings if finding.until is None]
    assert open_ones
    again = GradientMonitor()
    quiet_trainer(tmp_path / "b", again, max_epochs=2).fit(
        LeavesOut(),
        loader(make_batches(STEPS)),
        ckpt_path=str(tmp_path / "kept" / "last.ckpt"),
    )
    found = [finding.cause for finding in read_run(tmp_path / "b").findings]
    assert set(open_ones) <= set(found)


@RESUMES
@pytest.mark.usefixtures("_interruptible")
def test_what_was_found_after_the_checkpoint_is_taken_back(tmp_path: Path) -> None:
    keeps = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=4)
    model = Breaks()
    model.error = KeyboardInterrupt()
    trainer = quiet_trainer(tmp_path, GradGuard(), keeps, enable_checkpointing=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(model, loader(make_batches(STEPS, poisoned=(5,))))
    assert [finding.step for finding in read_run(tmp_path).findings] == [5]
    guard = GradGuard()
    quiet_trainer(tmp_path, guard).fit(
        Regression(), loader(make_batches(STEPS)), ckpt_path=str(tmp_path / "kept" / "last.ckpt")
    )
    assert guard.findings == []
    run = read_run(tmp_path)
    assert run.findings == []
    assert run.optimizers[0].actions == ()
    assert list(run.optimizers[0].steps["step"]) == list(range(STEPS))


def test_a_full_disk_ends_the_history_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gradguard").write_text("in the way", encoding="utf-8")
    guard = fit(tmp_path)
    assert not guard.broken
    assert len(guard.history) == STEPS
    said = [r.getMessage() for r in caplog.records if r.name == "lightning_gradguard"]
    assert len(said) == 1
    assert "the history of the run cannot be kept" in said[0].lower()


def test_a_disk_that_has_room_again_gets_all_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "_FLUSH_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(run_writer_module, "write_info", fails_at_first(2, write_info))
    guard = fit(tmp_path)
    part = read_run(tmp_path).optimizers[0]
    assert list(part.steps["step"]) == list(range(STEPS))
    assert read_run(tmp_path).info.status == "finished"
    assert (tmp_path / "gradguard/report.html").exists()
    assert not guard.broken
    said = [r.getMessage() for r in caplog.records if r.name == "lightning_gradguard"]
    assert [message for message in said if "cannot be kept" in message] == said


def fails_at_first(times: int, does: Callable[..., None]) -> Callable[..., None]:
    failures = iter(range(times))

    def attempt(*args: Any) -> None:
        if next(failures, None) is not None:
            raise PermissionError("someone else has it open")
        does(*args)

    return attempt


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_layers_stand_at_their_own_step(tmp_path: Path, make_optimizer: Any) -> None:
    """Also where a total is known some steps later than it was measured."""
    guard = fit(tmp_path, model=Regression(make_optimizer), steps=20)
    totals = {row.step: row.total_norm for row in guard.history}
    layers = read_run(tmp_path).optimizers[0].layers
    assert list(layers.steps) == [3, 7, 11, 15, 19]
    for step, norms in zip(layers.steps, layers.values, strict=True):
        assert math.sqrt((norms**2).sum()) == pytest.approx(totals[int(step)], rel=1e-3)


def test_who_logs_never_gets_no_layers(tmp_path: Path) -> None:
    own = OwnLogger()
    fit(tmp_path, logger=own, log_every_n_steps=0)
    assert not any("grad_norm/total" in row for _, row in own.rows)
    part = read_run(tmp_path).optimizers[0]
    assert len(part.steps["step"]) == STEPS
    assert len(part.layers.steps) == 0


def test_of_accumulated_batches_only_the_one_that_steps_is_logged(tmp_path: Path) -> None:
    logged: list[int] = []

    class Counts(GradGuard):
        def _log_step(self, pl_module: LightningModule) -> None:
            logged.append(self.engines[0].step)
            super()._log_step(pl_module)

    fit(tmp_path, Counts(), steps=32, accumulate_grad_batches=4)
    assert logged == [4, 8]


class Nameless(OwnLogger):
    """Its server does not answer."""

    @property
    def version(self) -> str | None:
        raise ConnectionError("no route to host")


def test_a_logger_that_does_not_know_itself_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = fit(tmp_path, logger=Nameless())
    assert not guard.broken
    assert len(read_run(tmp_path).optimizers[0].steps["step"]) == STEPS
    assert "Nameless does not tell where it keeps its files" in caplog.text


def test_an_error_in_the_history_leaves_the_guard_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are due before anything could be written: there is nothing to read yet."""
    monkeypatch.setattr(gallery_module, "DrawingBudget", AtOnce)
    guard = fit(tmp_path, logger=TensorBoardLogger(str(tmp_path)), log_every_n_steps=1)
    assert not guard.broken
    assert guard.engines[0].step == STEPS


def test_a_monitor_and_a_single_response_keep_a_history_too(tmp_path: Path) -> None:
    fit(tmp_path / "monitor", GradientMonitor())
    fit(tmp_path / "single", AdaptiveGradientClipping())
    assert "GradientMonitor" in read_run(tmp_path / "monitor").info.settings
    assert "AdaptiveGradientClipping" in read_run(tmp_path / "single").info.settings
    assert (tmp_path / "monitor/gradguard/report.html").exists()
    assert not (tmp_path / "single/gradguard/report.html").exists()


def test_of_several_guards_one_keeps_it(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, GradientMonitor(), AdaptiveGradientClipping())
    trainer.fit(Regression(), loader(make_batches(STEPS)))
    assert len(read_run(tmp_path).optimizers[0].steps["step"]) == STEPS
    assert not list(tmp_path.glob("gradguard/history-*"))


def test_a_trial_run_leaves_nothing_behind(tmp_path: Path) -> None:
    fit(tmp_path, fast_dev_run=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["history", "report"])
def test_what_is_no_switch_is_refused(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be True or False, got 1"):
        GradGuard(**{option: 1})


@pytest.mark.parametrize("off", ["events", "history", "report"])
def test_what_is_left_out_takes_along_what_is_made_of_it(tmp_path: Path, off: str) -> None:
    fit(tmp_path, GradGuard(**{off: False}), poisoned=(5,))
    made = {path.name for path in (tmp_path / "gradguard").iterdir()}
    all_of_it = ["incidents", "events.jsonl", "history", "report.html"]
    assert made == {"incidents", *all_of_it[1 : {"events": 1, "history": 2, "report": 3}[off]]}


# -- how many keys --------------------------------------------------------------------------------


class Wide(LightningModule):
    """Ten thousand tensors, five thousand layers, two of which are used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.ModuleList(nn.Linear(1, 1) for _ in range(10)) for _ in range(25))
            for _ in range(20)
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return torch.stack([p.sum() for p in self.parameters()]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_ten_thousand_tensors_make_fewer_than_a_thousand_keys(tmp_path: Path) -> None:
    assert len(list(Wide().parameters())) == 10_000
    own = OwnLogger()
    fit(tmp_path, GradientMonitor(report=False), Wide(), steps=4, logger=own)
    keys = {key for _, row in own.rows for key in row}
    assert 20 < len(keys) < 1000
    assert "grad_norm/blocks.19" in keys
    assert "update_ratio/blocks.19" in keys
    (part,) = read_run(tmp_path).optimizers
    assert len(part.layers.names) == 500  # of each block
    for name in ("blocks.0.0", "blocks.19.24"):
        assert name in part.layers.names


def test_layers_of_a_coarser_depth_are_those_of_the_finer_together(tmp_path: Path) -> None:
    own = OwnLogger()
    fit(tmp_path, GradientMonitor(report=False), Wide(), steps=4, logger=own)
    row = next(row for _, row in own.rows if "grad_norm/blocks.3" in row)
    (part,) = read_run(tmp_path).optimizers
    mine = [at for at, name in enumerate(part.layers.names) if name.startswith("blocks.3.")]
    together = math.sqrt((part.layers.values[0, mine] ** 2).sum())
    assert row["grad_norm/blocks.3"] == pytest.approx(together, rel=1e-3)


def test_run_json_is_plain(tmp_path: Path) -> None:
    fit(tmp_path)
    values = json.loads((tmp_path / "gradguard/history/run.json").read_text(encoding="utf-8"))
    assert values["schema"] == 1
    assert values["settings"]["GradGuard"]["mode"] == "protect"
