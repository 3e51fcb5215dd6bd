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

import lightning_gradguard
from lightning_gradguard import GradGuard
from lightning_gradguard.record import read_events
from tests.engines.long_run import OPTIMIZERS, POISONED, STEPS, run
from tests.models import Regression, assert_same_bits, loader, make_batches, quiet_trainer

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
    expected = [e for e in read_events(tmp_path / "whole" / EVENTS) if e["step"] >= 50]
    # A fused optimizer's steps are accounted for two steps later: the log has the last ones twice.
    assert [e for e in after[len(before) :] if e["step"] >= 50] == expected


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
