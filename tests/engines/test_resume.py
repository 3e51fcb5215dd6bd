"""A run that is killed and resumed ends in the bits of the run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import lightning_gradguard
from lightning_gradguard import GradGuard
from lightning_gradguard.record import read_events
from lightning_gradguard.respond import LearningRateBackoff, UpdateCap
from tests.engines.long_run import OPTIMIZERS, POISONED, STEPS, run
from tests.guard.loops import rmsprop
from tests.models import (
    Regression,
    adamw,
    assert_same_bits,
    fused_adamw,
    loader,
    make_batches,
    quiet_trainer,
    sgd,
)

pytestmark = [
    # The resumed run continues in the directory of the killed one, or leaves its own checkpoints.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    # The batches follow from the number of the step, not from the loader.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

EVENTS = Path("gradguard") / "events.jsonl"


def outcome(trainer: Any, model: Any, guard: GradGuard, since: int) -> dict[str, Any]:
    return {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "guard": guard.state_dict(),
        "history": [asdict(row) for row in guard.history if row.step >= since],
        "actions": [action.to_dict() for action in guard.actions if action.step >= since],
        "findings": [finding.to_dict() for finding in guard.findings if finding.step >= since],
    }


def checkpoint_at(root: Path, step: int) -> Path:
    return root / "checkpoints" / f"step={step}.ckpt"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_exact_wherever_it_starts(tmp_path: Path, optimizer: str) -> None:
    whole = run(tmp_path / "whole", optimizer)
    history = whole[2].history
    assert [row.step for row in history if row.skipped] == list(POISONED)
    assert any(row.clip_coef < 1.0 for row in history)
    assert any(row.capped_tensors for row in history)
    for step in (10, 20, 50, 70):
        resumed = run(
            tmp_path / str(step), optimizer, checkpoint=checkpoint_at(tmp_path / "whole", step)
        )
        assert [row.step for row in resumed[2].history if row.step >= step] == list(
            range(step, STEPS)
        )
        assert_same_bits(outcome(*resumed, step), outcome(*whole, step), f"resumed at {step}")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "fused_sgd"])
def test_a_killed_run_resumes_exactly_and_its_events_survive(
    tmp_path: Path, optimizer: str
) -> None:
    whole = run(tmp_path / "whole", optimizer)
    root = tmp_path / "killed"
    killed = subprocess.run(
        [sys.executable, "-m", "tests.engines.long_run", str(root), optimizer, "55"],
        cwd=Path(lightning_gradguard.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = list(read_events(root / EVENTS))
    text = (root / EVENTS).read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert len(before) == len(text.splitlines())
    skips = [e["step"] for e in before if e["event"] == "action" and e["kind"] == "skip"]
    assert skips == list(POISONED)
    resumed = run(root, optimizer, checkpoint=checkpoint_at(root, 50))
    assert_same_bits(outcome(*resumed, 50), outcome(*whole, 50))
    after = list(read_events(root / EVENTS))
    assert after[: len(before)] == before, "the resumed run wrote over the log"
    resumes, *after = after[len(before) :]
    assert (resumes["event"], resumes["step"]) == ("resumed", 50)
    expected = [e for e in read_events(tmp_path / "whole" / EVENTS) if e["step"] >= 50]
    # A fused optimizer's steps are accounted for two steps later: the log has the last ones twice.
    assert [e for e in after if e["step"] >= 50] == expected


def test_checkpoints_hold_plain_values(tmp_path: Path) -> None:
    run(tmp_path, "fused_adamw")
    checkpoint = torch.load(checkpoint_at(tmp_path, 50), weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "GradGuard" in k]

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    assert plain(state)
    assert state["engines"]


def test_a_checkpoint_written_after_the_fit_holds_the_state_of_its_end(tmp_path: Path) -> None:
    guard = GradGuard()
    trainer = quiet_trainer(tmp_path, guard)
    trainer.fit(Regression(), loader(make_batches(8)))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    later = GradGuard()
    trainer = quiet_trainer(tmp_path, later, max_epochs=2)
    trainer.fit(Regression(), loader(make_batches(8)), ckpt_path=tmp_path / "end.ckpt")
    assert [row.step for row in later.history] == list(range(8, 16))


def test_a_checkpoint_of_another_number_of_optimizers_starts_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = GradGuard()
    guard.load_state_dict({"engines": []})
    quiet_trainer(tmp_path, guard).fit(Regression(), loader(make_batches(3)))
    assert "starts afresh" in caplog.text
    assert len(guard.history) == 3


def test_a_checkpoint_written_without_the_guard_can_be_resumed_with_it(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Regression(), loader(make_batches(4)))
    trainer.save_checkpoint(tmp_path / "bare.ckpt")
    guard = GradGuard()
    trainer = quiet_trainer(tmp_path, guard, max_epochs=2)
    trainer.fit(Regression(), loader(make_batches(4)), ckpt_path=tmp_path / "bare.ckpt")
    assert len(guard.history) == 4


# -- in the middle of a back-off -------------------------------------------------------------------

BACKING_OFF: dict[str, Any] = {
    # Every update is large and the loss hardly changes, so that smaller ones are tried.
    "cap": UpdateCap(max_ratio=1e-3, window=6),
    "backoff": LearningRateBackoff(cooldown_steps=8, recovery_steps=8),
    "rollback": None,
}
BATCHES = make_batches(100, poisoned=(52, 53, 54, 70, 71))
SAVED_AT = (13, 37, 47, 53, 54, 56, 58, 71, 75)


class BackingOff(Regression):
    """Its loss gets worse for a while; batches follow from the number of the step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        step = self.global_step
        return self.loss(BATCHES[step]) * (60.0 if 40 <= step < 62 else 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * len(BATCHES))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class SaveAt(Callback):
    """Checkpoints between two steps, and what the ladder is in the middle of at each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stages: set[str] = set()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step not in SAVED_AT:
            return
        trainer.save_checkpoint(self.root / f"{trainer.global_step}.ckpt")
        (guard,) = (c for c in trainer.callbacks if isinstance(c, GradGuard))
        ladder: Any = guard.engines[0]._pipeline.ladder
        stages = {
            "trial": ladder.schedule.trial is not None,
            "cooldown": not ladder.rate.settled,
            "recovery": ladder.rate.settled and ladder.rate.scale < 1.0,
            "skip streak": ladder.budget.consecutive > 0,
        }
        self.stages |= {name for name, holds in stages.items() if holds}


@pytest.mark.parametrize(
    "make_optimizer", [adamw, fused_adamw, sgd, rmsprop], ids=lambda f: f.__name__
)
def test_a_back_off_goes_on_where_it_was(tmp_path: Path, make_optimizer: Any) -> None:
    def train(*callbacks: Callback, **arguments: Any) -> tuple[Any, Any, GradGuard]:
        guard, model = GradGuard(**BACKING_OFF), BackingOff(make_optimizer)
        how = {"max_epochs": -1, "max_steps": len(BATCHES)}
        trainer = quiet_trainer(tmp_path, guard, *callbacks, **how)
        trainer.fit(model, loader(list(range(30))), **arguments)
        return trainer, model, guard

    save = SaveAt(tmp_path)
    whole = train(save)
    assert save.stages == {"trial", "cooldown", "recovery", "skip streak"}
    assert {action.kind.value for action in whole[2].actions} >= {"tighten", "back_off", "skip"}
    for step in SAVED_AT:
        resumed = train(ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        assert_same_bits(outcome(*resumed, step), outcome(*whole, step), f"resumed at {step}")
