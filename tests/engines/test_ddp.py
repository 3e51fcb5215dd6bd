"""Data parallelism on two real processes: the ranks decide alike, and nobody waits forever."""

from __future__ import annotations

import io
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_gradguard import GradGuard
from lightning_gradguard.record.run_reader import read_run
from lightning_gradguard.respond import AdaptiveClip, SkipBadSteps
from tests.distributed import run_on_ranks
from tests.engines.test_failures import FAILS_AT, FailingGuard, FaultError
from tests.models import (
    Batch,
    Regression,
    adamw,
    assert_same_bits,
    fixed_cap,
    fused_adamw,
    guard_without,
    loader,
    make_batches,
    plain_loop,
    quiet_trainer,
    sgd,
)

pytestmark = pytest.mark.slow

RANKS = 2
OPTIMIZERS = {"adamw": adamw, "fused_adamw": fused_adamw, "sgd": sgd}


def launched() -> None:
    """Tell Lightning that its processes were started for it, as torchrun does."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


def run_cases(function: Any, root: str, cases: list[tuple[Any, ...]]) -> bytes:
    """What ``function(root, *case)`` returns for each case, one after the other on this rank.

    As bytes: tensors in shared memory would be gone with the process that sent them.
    """
    launched()
    buffer = io.BytesIO()
    torch.save([function(root, *case) for case in cases], buffer)
    return buffer.getvalue()


def both_ranks(function: Any, root: Path, *cases: tuple[Any, ...], timeout: float = 100.0) -> Any:
    """The results of the two ranks for each case; starting the processes takes most of the time."""
    results = run_on_ranks(run_cases, RANKS, function, str(root), list(cases), timeout=timeout)
    return list(zip(*[torch.load(io.BytesIO(r), weights_only=True) for r in results], strict=True))


class Messages(logging.Handler):
    """What the guard says on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        logging.getLogger("lightning_gradguard").handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def errors(self) -> list[str]:
        """Of the guard itself; findings are told on the first rank only."""
        said = [record.getMessage() for record in self.records]
        return [message for message in said if "training goes on" in message]


def part_of(batch: Batch) -> Batch:
    """This rank's half."""
    half = len(batch[0]) // RANKS
    start = dist.get_rank() * half
    return batch[0][start : start + half], batch[1][start : start + half]


def fit(root: str, guard: GradGuard, model: Regression, batches: list[Batch]) -> dict[str, Any]:
    messages = Messages()
    trainer = quiet_trainer(
        root,
        guard,
        devices=RANKS,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader([part_of(batch) for batch in batches]))
    state = trainer.optimizers[0].state_dict()
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": state["state"],
        "history": [asdict(row) for row in guard.history],
        # What the ranks decide together. Where a NaN arose is for each to say as it sees it.
        "findings": [
            [f.pathology.value, f.severity.label, f.step] for f in guard.findings if not f.local
        ],
        "errors": messages.errors,
        "active": [engine.active for engine in guard.engines],
        "hooks": len(trainer.optimizers[0]._optimizer_step_post_hooks),
        "steps": trainer.global_step,
    }


def column(result: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in result["history"]]


def poison_last_half(batches: list[Batch], number: int) -> None:
    """The NaN is in the part of the last rank only."""
    batches[number][0][-1, 0] = torch.nan


# -- healthy runs and bad batches -----------------------------------------------------------------


def skip_run(root: str, optimizer: str) -> dict[str, Any]:
    batches = make_batches(10)
    poison_last_half(batches, 4)
    guard = guard_without(skip=SkipBadSteps())
    return fit(root, guard, Regression(OPTIMIZERS[optimizer]), batches)


def test_a_nan_on_one_rank_is_skipped_by_both(tmp_path: Path) -> None:
    cases = [("adamw",), ("fused_adamw",)]
    results = both_ranks(skip_run, tmp_path, *cases)
    for (optimizer,), (first, second) in zip(cases, results, strict=True):
        assert_same_bits(first, second)
        assert column(first, "skipped") == [number == 4 for number in range(10)]
        assert first["errors"] == []
        batches = make_batches(10)
        poison_last_half(batches, 4)
        plain = Regression(OPTIMIZERS[optimizer])
        run = plain_loop(plain, batches, omit={4})
        assert column(first, "total_norm") == pytest.approx(run.norms, rel=1e-4, nan_ok=True)
        assert column(first, "loss") == pytest.approx(run.losses, rel=1e-4, nan_ok=True)
        # The mean over two halves is rounded differently from the mean over the whole.
        torch.testing.assert_close(first["weights"], dict(plain.state_dict()), rtol=1e-4, atol=1e-5)


def bounded_run(root: str, optimizer: str) -> dict[str, Any]:
    batches = make_batches(40)
    poison_last_half(batches, 30)
    guard = guard_without(clip=AdaptiveClip(multiple=0.5), cap=fixed_cap(0.01), skip=SkipBadSteps())
    return fit(root, guard, Regression(OPTIMIZERS[optimizer]), batches)


def test_all_bounds_are_the_same_on_both_ranks(tmp_path: Path) -> None:
    for first, second in both_ranks(bounded_run, tmp_path, *[(name,) for name in OPTIMIZERS]):
        assert_same_bits(first, second)
        assert min(column(first, "clip_coef")) == 0.0
        assert any(0.0 < coefficient < 1.0 for coefficient in column(first, "clip_coef"))
        assert any(column(first, "capped_tensors"))
        assert first["errors"] == []


def default_run(root: str) -> dict[str, Any]:
    batches = make_batches(60, poisoned=(20,))
    return fit(root, GradGuard(), Regression(), batches)


def test_the_defaults(tmp_path: Path) -> None:
    ((first, second),) = both_ranks(default_run, tmp_path, ())
    assert_same_bits(first, second)
    assert len(first["history"]) == 60
    events = tmp_path / "gradguard" / "events.jsonl"
    skips = [line for line in events.read_text(encoding="utf-8").splitlines() if '"skip"' in line]
    assert len(skips) == 1, "one rank writes the log, and only one"


class NoGradientOnOneRank(Regression):
    """The second rank's loss is NaN where the first one's is not, without a NaN in the data."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * torch.nan if (batch_idx, dist.get_rank()) == (3, 1) else loss


def nan_loss_run(root: str) -> dict[str, Any]:
    return fit(root, guard_without(skip=SkipBadSteps()), NoGradientOnOneRank(), make_batches(6))


def test_a_nan_loss_on_one_rank_is_known_to_both(tmp_path: Path) -> None:
    ((first, second),) = both_ranks(nan_loss_run, tmp_path, ())
    assert_same_bits(first, second)
    assert column(first, "skipped") == [number == 3 for number in range(6)]


# -- the guard fails on one rank ------------------------------------------------------------------


class FailsOnOneRank(FailingGuard):
    def __init__(self, place: str) -> None:
        super().__init__(place)
        # Something that the ranks have to agree on as long as they guard.
        self.clip = AdaptiveClip(multiple=0.5)
        self.cap = fixed_cap(0.005)

    def _make_engine(self, *args: Any) -> Any:
        if dist.get_rank() == 1:
            return super()._make_engine(*args)
        return GradGuard._make_engine(self, *args)


def failing_engine_run(root: str, place: str, optimizer: str) -> dict[str, Any]:
    batches = make_batches(40)
    return fit(root, FailsOnOneRank(place), Regression(OPTIMIZERS[optimizer]), batches)


# One before the ranks agree, and the ones after.
ENGINE_PLACES = [
    "_watched.meter.measure",
    "_pipeline.ladder.plan",
    "_pipeline._diagnosis.detectors.0.observe",
    "recorder.step",
    "_after_step",
]


def check_off_on_both(first: dict[str, Any], second: dict[str, Any], steps: int) -> None:
    assert (first["steps"], second["steps"]) == (steps, steps)
    for result in (first, second):
        assert not any(result["active"])
        assert result["hooks"] == 0
        assert len(result["errors"]) == 1
    assert "another rank" in first["errors"][0]


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adamw"])
def test_a_failure_on_one_rank_turns_both_off(tmp_path: Path, optimizer: str) -> None:
    cases = [(place, optimizer) for place in ENGINE_PLACES]
    for first, second in both_ranks(failing_engine_run, tmp_path, *cases, timeout=60.0):
        check_off_on_both(first, second, 40)
        assert "FaultError" in second["errors"][0]


class FailingCallback(GradGuard):
    """One method of the callback, outside the engine, raises on the second rank."""

    def __init__(self, place: str) -> None:
        super().__init__(clip=AdaptiveClip(multiple=0.5), cap=fixed_cap(0.005), backoff=None)
        original, calls = getattr(self, place), [0]

        def fails(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if dist.get_rank() == 1 and (calls[0] > FAILS_AT or place in AT_THE_START):
                raise FaultError(place)
            return original(*args, **kwargs)

        setattr(self, place, fails)


AT_THE_START = ("_make_engine", "_restore")
CALLBACK_PLACES = [*AT_THE_START, "_step_loss", "_log_step"]


def failing_callback_run(root: str, place: str, optimizer: str) -> dict[str, Any]:
    batches = make_batches(40)
    return fit(root, FailingCallback(place), Regression(OPTIMIZERS[optimizer]), batches)


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adamw"])
def test_a_failure_around_the_engine_turns_both_off(tmp_path: Path, optimizer: str) -> None:
    cases = [(place, optimizer) for place in CALLBACK_PLACES]
    for first, second in both_ranks(failing_callback_run, tmp_path, *cases, timeout=60.0):
        check_off_on_both(first, second, 40)


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adamw"])
def test_weights_stay_equal_after_a_failure_on_one_rank(tmp_path: Path, optimizer: str) -> None:
    """Whatever one rank did to its last guarded steps, the other did too, or it is made good."""
    cases = [(place, optimizer) for place in ENGINE_PLACES]
    differ = [
        place
        for (place, _), (first, second) in zip(
            cases, both_ranks(failing_engine_run, tmp_path, *cases, timeout=60.0), strict=True
        )
        if any(not torch.equal(first["weights"][n], second["weights"][n]) for n in first["weights"])
    ]
    assert differ == []


def unwritable_run(root: str) -> dict[str, Any]:
    """Only the first rank writes the log, so only the first rank fails."""
    batches = make_batches(20, poisoned=(5,))
    return fit(root, guard_without(skip=SkipBadSteps()), Regression(), batches)


def test_a_log_that_the_first_rank_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "gradguard").write_text("in the way", encoding="utf-8")
    ((first, second),) = both_ranks(unwritable_run, tmp_path, (), timeout=50.0)
    assert_same_bits(first["weights"], second["weights"])
    assert (first["steps"], second["steps"]) == (20, 20)
    assert first["active"] == second["active"]
    assert all(value.isfinite().all() for value in first["weights"].values())


def recorded_run(root: str) -> dict[str, Any]:
    return fit(root, GradGuard(), Regression(), make_batches(20, poisoned=(5,)))


def test_the_first_rank_alone_records_the_run(tmp_path: Path) -> None:
    """What it has written is what all of them have decided."""
    ((first, second),) = both_ranks(recorded_run, tmp_path, (), timeout=50.0)
    assert first["errors"] == second["errors"] == []
    (part,) = read_run(tmp_path).optimizers
    assert list(part.steps["step"]) == list(range(20))
    np.testing.assert_allclose(part.steps["total_norm"], column(second, "total_norm"), rtol=1e-5)
    assert [action.step for action in part.actions] == [5]
    assert not list(tmp_path.glob("gradguard/history-*"))
    assert (tmp_path / "gradguard/report.html").exists()
