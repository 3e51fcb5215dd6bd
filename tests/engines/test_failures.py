"""Nothing that the guard does itself ends a run, and whatever ends a run leaves nothing behind."""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_gradguard import GradGuard, GradientMonitor, GuardEngine
from lightning_gradguard.callbacks import base
from lightning_gradguard.callbacks.records import Records
from lightning_gradguard.record import EventLog, Recorder
from lightning_gradguard.respond import LearningRateBackoff, SkipBadSteps
from tests.models import (
    Batch,
    Regression,
    adamw,
    assert_same_bits,
    assert_untouched,
    fused_adamw,
    guard_without,
    loader,
    make_batches,
    quiet_trainer,
)

OPTIMIZERS = pytest.mark.parametrize(
    "make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__
)
BATCHES = 12
FAILS_AT = 5


class FaultError(RuntimeError):
    """What is wrong with the guard in these tests."""


class FailingGuard(GradGuard):
    """A guard of which one part raises from step ``FAILS_AT`` on; all responses off but skipping.

    Args:
        place: The attribute of the engine, or of a part of it, that raises.
    """

    def __init__(self, place: str) -> None:
        super().__init__(clip=None, cap=None, backoff=None, skip=SkipBadSteps())
        self.place = place

    def _make_engine(self, *args: Any) -> GuardEngine:
        engine = super()._make_engine(*args)
        owner: Any = engine
        *path, name = self.place.split(".")
        for part in path:
            owner = owner[0] if part == "0" else getattr(owner, part)
        original = getattr(owner, name)

        def fails_later(*args: Any, **kwargs: Any) -> Any:
            if engine.step > FAILS_AT:
                raise FaultError(self.place)
            return original(*args, **kwargs)

        setattr(owner, name, fails_later)
        return engine


PLACES = [
    "_watched.meter.measure",
    "_agreement.reach",
    "_controls.apply",
    "_pipeline._diagnosis.detectors.0.observe",
    "_pipeline.ladder.plan",
    "_pipeline.ladder.observe",
    "recorder.step",
    "_after_step",
    "_late.push",
]


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [
        record
        for record in caplog.records
        if record.name == "lightning_gradguard" and record.levelno >= logging.ERROR
    ]


@pytest.mark.parametrize("place", PLACES)
@OPTIMIZERS
def test_an_internal_failure_turns_the_guard_off_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, make_optimizer: Any
) -> None:
    guard, model = FailingGuard(place), Regression(make_optimizer)
    trainer = quiet_trainer(tmp_path, guard, log_every_n_steps=1)
    trainer.fit(model, loader(make_batches(BATCHES)))
    assert trainer.global_step == BATCHES
    bare = Regression(make_optimizer)
    quiet_trainer(tmp_path).fit(bare, loader(make_batches(BATCHES)))
    assert_same_bits(model.state_dict(), bare.state_dict())
    assert_untouched(trainer.optimizers[0], 1e-2)
    unused = {adamw: ("_controls.apply", "_late.push"), fused_adamw: ()}
    if place in unused[make_optimizer]:
        assert errors(caplog) == []
        return
    (record,) = errors(caplog)
    assert "training goes on" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], FaultError)
    assert not guard.engines[0].active
    assert len(guard.history) <= FAILS_AT + 1


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_train_end",
        "teardown",
    ],
)
@OPTIMIZERS
def test_a_failure_in_any_hook(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hook: str, make_optimizer: Any
) -> None:
    class Failing(GradGuard):
        pass

    def fails(self: GradGuard, *args: Any, **kwargs: Any) -> None:
        raise FaultError(hook)

    fails.__name__ = hook
    setattr(Failing, hook, base.contained(fails))
    guard, model = Failing(), Regression(make_optimizer)
    trainer = quiet_trainer(tmp_path, guard)
    trainer.fit(model, loader(make_batches(BATCHES)))
    assert trainer.global_step == BATCHES
    (record,) = errors(caplog)
    assert hook in record.getMessage()
    assert_untouched(trainer.optimizers[0], 1e-2)


def test_a_state_that_cannot_be_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = GradGuard()
    guard.load_state_dict({"engines": [{"step": "not a number"}]})
    trainer = quiet_trainer(tmp_path, guard)
    trainer.fit(Regression(), loader(make_batches(4)))
    assert trainer.global_step == 4
    assert len(errors(caplog)) == 1
    assert_untouched(trainer.optimizers[0], 1e-2)


def test_a_state_that_cannot_be_saved_does_not_lose_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unsavable(GradGuard):
        def _make_engine(self, *args: Any) -> GuardEngine:
            engine = super()._make_engine(*args)

            def state_dict() -> dict[str, Any]:
                raise FaultError("state_dict")

            engine._pipeline.state_dict = state_dict  # type: ignore[method-assign]
            return engine

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    trainer = quiet_trainer(tmp_path, Unsavable(), Save())
    trainer.fit(Regression(), loader(make_batches(4)))
    assert trainer.global_step == 4
    assert "state_dict" in torch.load(tmp_path / "during.ckpt", weights_only=True)
    assert len(errors(caplog)) == 1


# -- the event log --------------------------------------------------------------------------------


@pytest.fixture
def cannot_write(tmp_path: Path) -> Iterator[Path]:
    """A root in which no folder can be made: a file has the name of the folder."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "gradguard").write_text("in the way", encoding="utf-8")
    yield root
    assert (root / "gradguard").read_text(encoding="utf-8") == "in the way"


@OPTIMIZERS
@pytest.mark.parametrize("make_guard", [GradGuard, GradientMonitor])
def test_a_log_that_cannot_be_written(
    cannot_write: Path, caplog: pytest.LogCaptureFixture, make_optimizer: Any, make_guard: Any
) -> None:
    guard = make_guard()
    trainer = quiet_trainer(cannot_write, guard)
    trainer.fit(Regression(make_optimizer), loader(make_batches(BATCHES, poisoned=(FAILS_AT,))))
    assert trainer.global_step == BATCHES
    complaints = [r for r in errors(caplog) if "training goes on" in r.getMessage()]
    assert len(complaints) == 2  # of the events and of the history, once each
    assert_untouched(trainer.optimizers[0], 1e-2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gradguard"
    folder.mkdir()
    (folder / "events.jsonl").symlink_to("/dev/full")
    trainer = quiet_trainer(tmp_path, GradGuard())
    trainer.fit(Regression(), loader(make_batches(BATCHES, poisoned=(FAILS_AT,))))
    assert trainer.global_step == BATCHES
    complaints = [r for r in errors(caplog) if "training goes on" in r.getMessage()]
    assert len(complaints) == 1


def test_a_run_whose_log_fails_stays_guarded(cannot_write: Path) -> None:
    """The NaN that could not be written down was dropped all the same, and so is the next one."""
    model = Regression()
    guard = guard_without(skip=SkipBadSteps())
    batches = make_batches(BATCHES, poisoned=(FAILS_AT, FAILS_AT + 3))
    quiet_trainer(cannot_write, guard).fit(model, loader(batches))
    assert all(p.isfinite().all() for p in model.parameters())
    assert guard.counts["skipped_steps"] == 2
    assert not guard.broken


def test_the_next_fit_is_guarded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = GradGuard()

    def fails(*_: Any) -> None:
        raise RuntimeError("once")

    with monkeypatch.context() as patch:
        patch.setattr(Records, "log", fails)
        trainer = quiet_trainer(tmp_path, guard, log_every_n_steps=1)
        trainer.fit(Regression(), loader(make_batches(4)))
    assert guard.broken
    batches = make_batches(BATCHES, poisoned=(FAILS_AT,))
    quiet_trainer(tmp_path, guard).fit(Regression(), loader(batches))
    assert not guard.broken
    assert guard.counts["skipped_steps"] == 1
    assert len(guard.history) == BATCHES


def test_a_guard_that_has_run_can_be_pickled(tmp_path: Path) -> None:
    guard = GradGuard()
    quiet_trainer(tmp_path, guard).fit(Regression(), loader(make_batches(BATCHES)))
    again = pickle.loads(pickle.dumps(guard))
    assert str(again.report()) == str(guard.report())


# -- the run ends by itself -----------------------------------------------------------------------


class EndsBadly(Regression):
    """Raises or is interrupted in the middle of a step.

    Args:
        make_optimizer: Makes the optimizer.
        end: Raises.
        place: In which hook.
    """

    def __init__(self, make_optimizer: Any, end: Any, place: str) -> None:
        super().__init__(make_optimizer)
        self.end = end
        self.place = place

    def _ends(self, place: str) -> None:
        if place == self.place and self.global_step == FAILS_AT:
            self.end()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._ends("training_step")
        return self.loss(batch)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self._ends("between measuring and stepping")


def raises() -> None:
    raise ValueError("the user's own")


def interrupts() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Lightning ignores further interrupts after the first one, in the whole process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@OPTIMIZERS
@pytest.mark.parametrize("place", ["training_step", "between measuring and stepping"])
@pytest.mark.parametrize(
    ("end", "error"), [(raises, ValueError), (interrupts, SystemExit)], ids=["raises", "Ctrl-C"]
)
@pytest.mark.usefixtures("_interruptible")
def test_the_optimizer_is_left_as_it_was(
    tmp_path: Path, make_optimizer: Any, place: str, end: Any, error: Any
) -> None:
    """Also while its learning rate is cut, and while it is told by its attributes what to do."""
    guard = guard_without(
        skip=SkipBadSteps(), backoff=LearningRateBackoff(factor=0.5, recovery_steps=1000)
    )
    cut: list[float] = []

    class CutNow(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            ladder = guard.engines[0]._pipeline.ladder
            assert ladder is not None
            assert ladder.rate is not None
            ladder.rate.cut()

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            cut.append(optimizer.param_groups[0]["lr"])

    trainer = quiet_trainer(tmp_path, guard, CutNow(), Watch())
    with pytest.raises(error):
        trainer.fit(EndsBadly(make_optimizer, end, place), loader(make_batches(BATCHES)))
    assert set(cut) == {0.005}, "the rate was not cut during the steps"
    assert_untouched(trainer.optimizers[0], 1e-2)
    assert len(guard.history) == FAILS_AT
    # What was guarded can go on unguarded.
    trainer.optimizers[0].step()


def test_the_event_log_is_closed_after_an_exception(tmp_path: Path) -> None:
    guard = GradGuard()
    trainer = quiet_trainer(tmp_path, guard)
    model = EndsBadly(adamw, raises, "training_step")
    with pytest.raises(ValueError, match="the user's own"):
        trainer.fit(model, loader(make_batches(BATCHES, poisoned=(2,))))
    log = guard.engines[0].recorder.events
    assert isinstance(log, EventLog)
    assert log._file is None
    assert (tmp_path / "gradguard" / "events.jsonl").read_text(encoding="utf-8").count("\n") >= 2


def test_an_engine_by_hand_closes_completely() -> None:
    model = Regression()
    optimizer = model.configure_optimizers()
    engine = GuardEngine(model, optimizer, recorder=Recorder(silent=True))
    model.loss(make_batches(1)[0]).backward()
    engine.before_step(1.0)
    engine.close()
    assert_untouched(optimizer, 1e-2)
    engine.before_step(1.0)  # and stays closed
    optimizer.step()
    assert_untouched(optimizer, 1e-2)
