"""A run that cannot be saved stops by itself, and leaves a checkpoint and its report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_gradguard import GradGuard
from lightning_gradguard.callbacks.stopping import StoppedRun
from lightning_gradguard.respond import ActionKind, SkipBadSteps, WeightRollback
from tests.engines.test_ddp import RANKS, Messages, both_ranks, part_of
from tests.models import (
    Regression,
    adamw,
    assert_same_bits,
    fused_adamw,
    loader,
    make_batches,
    quiet_trainer,
)

BATCHES = 60
BAD_FROM = 30


def guard(**how: Any) -> GradGuard:
    rollback = WeightRollback(every_n_steps=10, max_rollbacks=1)
    return GradGuard(**{"skip": SkipBadSteps(max_consecutive=4), "rollback": rollback, **how})


def bad_batches() -> Any:
    return make_batches(BATCHES, poisoned=range(BAD_FROM, BATCHES))


class KeepFirst(Callback):
    """Weights before each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_a_stopped_run_leaves_its_state_and_its_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_optimizer: Any
) -> None:
    ours, keep = guard(), KeepFirst()
    model = Regression(make_optimizer)
    trainer = quiet_trainer(tmp_path, ours, keep)
    trainer.fit(model, loader(bad_batches()))
    late = 2 if make_optimizer is fused_adamw else 0
    assert trainer.should_stop
    assert trainer.global_step == BAD_FROM + 8 + 2 * late
    kinds = [a.kind for a in ours.actions if a.kind is not ActionKind.SKIP]
    assert kinds == [ActionKind.ROLL_BACK, ActionKind.STOP]
    stop = next(action.step for action in ours.actions if action.kind is ActionKind.STOP)
    folder = tmp_path / "gradguard"
    checkpoint = folder / f"stopped-step={stop}.ckpt"
    report = folder / f"stopped-step={stop}.txt"
    assert sorted(folder.glob("stopped*")) == [checkpoint, report]
    assert "Stopping at step" in report.read_text(encoding="utf-8")
    named = [r for r in caplog.records if "is asked to stop" in r.getMessage()]
    assert len(named) == 1
    assert str(checkpoint) in named[0].getMessage()
    assert str(report) in named[0].getMessage()
    # What is left are the weights of the older copy: a newer one was made at step 20, or at step
    # 30, which a fused optimizer does not yet know to be bad.
    expected = keep.weights[20 if late else 10]
    saved = torch.load(checkpoint, weights_only=True)
    assert_same_bits(saved["state_dict"], expected)
    assert_same_bits(dict(model.state_dict()), expected)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_the_run_can_be_resumed_from_there(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, guard()).fit(Regression(), loader(bad_batches()))
    (checkpoint,) = (tmp_path / "gradguard").glob("*.ckpt")
    again = guard()
    trainer = quiet_trainer(tmp_path, again, max_epochs=2)
    trainer.fit(Regression(), loader(make_batches(BATCHES)), ckpt_path=checkpoint)
    assert not again.engines[0].should_stop
    assert again.history[-1].loss < 1.0
    assert len(again.history) > BATCHES / 2


def test_a_run_that_goes_on_all_the_same_is_saved_once(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, guard(), min_steps=BATCHES)
    trainer.fit(Regression(), loader(bad_batches()))
    assert trainer.global_step == BATCHES
    assert len(list((tmp_path / "gradguard").glob("stopped*"))) == 2


def test_it_goes_where_the_logger_goes(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="runs", version="first")
    trainer = quiet_trainer(tmp_path, guard(), logger=logger, log_every_n_steps=1)
    trainer.fit(Regression(), loader(bad_batches()))
    assert len(list((tmp_path / "runs" / "first" / "gradguard").glob("stopped*"))) == 2
    metrics = (tmp_path / "runs" / "first" / "metrics.csv").read_text(encoding="utf-8")
    assert "gradguard/rollbacks" in metrics.splitlines()[0]


def test_a_trial_run_saves_nothing(tmp_path: Path) -> None:
    batches = make_batches(12, poisoned=range(12))
    trainer = quiet_trainer(tmp_path, guard(), fast_dev_run=12)
    trainer.fit(Regression(), loader(batches))
    assert not (tmp_path / "gradguard").exists()


def test_a_healthy_run_leaves_nothing(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, guard()).fit(Regression(), loader(make_batches(BATCHES)))
    assert not list(tmp_path.rglob("stopped*"))


def test_without_the_rungs_it_stops_as_well(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, guard(rollback=None))
    trainer.fit(Regression(), loader(bad_batches()))
    assert trainer.global_step == BAD_FROM + 4
    assert len(list((tmp_path / "gradguard").glob("stopped*"))) == 2


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "cannot be saved" in r.getMessage()]


def test_a_full_disk_is_said_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = guard(events=False)
    trainer = quiet_trainer(tmp_path, ours, min_steps=BATCHES)

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_checkpoint", save_checkpoint)
    trainer.fit(Regression(), loader(bad_batches()))
    (message,) = errors(caplog)
    assert "No space left on device" in message
    assert not ours.broken
    assert trainer.global_step == BATCHES


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gradguard").write_text("in the way", encoding="utf-8")
    trainer = quiet_trainer(tmp_path, guard(events=False))
    trainer.fit(Regression(), loader(bad_batches()))
    assert len(errors(caplog)) == 1
    assert trainer.global_step == BAD_FROM + 8


def test_an_engine_that_does_not_stop_saves_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    StoppedRun(tmp_path / "folder").save(trainer, GradGuard())
    assert not (tmp_path / "folder").exists()


# -- two ranks -------------------------------------------------------------------------------------


def stopped_run(root: str, fails: bool) -> dict[str, Any]:
    messages = Messages()
    trainer = quiet_trainer(
        root,
        guard(),
        devices=RANKS,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
    )
    if fails and trainer.is_global_zero:

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        trainer.strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    model = Regression()
    trainer.fit(model, loader([part_of(batch) for batch in bad_batches()]))
    said = [r.getMessage() for r in messages.records if r.levelno >= logging.WARNING]
    return {
        "steps": trainer.global_step,
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "saved": sum("is asked to stop" in message for message in said),
        "failed": sum("cannot be saved" in message for message in said),
    }


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_two_ranks_stop_together_whether_or_not_it_can_be_saved(
    tmp_path: Path, fails: bool
) -> None:
    ((first, second),) = both_ranks(stopped_run, tmp_path, (fails,))
    assert first["steps"] == second["steps"] == BAD_FROM + 8
    assert_same_bits(first["weights"], second["weights"])
    assert (first["saved"], second["saved"]) == ((0, 0) if fails else (1, 0))
    assert (first["failed"], second["failed"]) == ((1, 0) if fails else (0, 0))
    assert len(list((tmp_path / "gradguard").glob("stopped*"))) == (0 if fails else 2)
