"""Measuring through time harms no run: no bit, no hook left, no error passed on, exact resume."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_gradguard import GradGuard, GradientMonitor, GuardEngine
from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.measure.timesteps import Snapshot
from tests.engines.sequences import Reader, Validated, batches, hooks_of, train
from tests.models import assert_same_bits, loader, quiet_trainer


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt], ids=str)
@pytest.mark.parametrize("where", ["training_step", "backward"])
def test_hooks_are_gone_however_training_ends(tmp_path: Path, end: Any, where: str) -> None:
    class Ending(Reader):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if end is not None and batch_idx == 2:
                if where == "training_step":
                    raise end
                loss.register_hook(self.stop)
            return loss

        def stop(self, _: Tensor) -> None:
            raise end

    model = Ending()
    trainer = quiet_trainer(tmp_path, GradGuard())
    if end is None:
        trainer.fit(model, loader(batches(4)))
    else:
        with pytest.raises((end, SystemExit)):
            trainer.fit(model, loader(batches(4)))
    assert hooks_of(model) == 0


def test_no_watching_if_not_wanted(tmp_path: Path) -> None:
    class Watcher(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(hooks_of(module))

    seen: list[int] = []
    guard = GradGuard(timesteps=None)
    quiet_trainer(tmp_path, guard, Watcher()).fit(Reader(), loader(batches(4)))
    assert [seen[0], seen[3]] == [0, 0]  # at steps 1 and 2 the layers are looked at
    assert guard.engines[0].watched_in_time == ()
    assert guard.time_readings == []


def final(root: Path, model: LightningModule, *callbacks: Callback, **settings: Any) -> Any:
    torch.manual_seed(3)
    trainer = quiet_trainer(root, *callbacks, **settings)
    data = loader(batches(12))
    trainer.fit(model, data, data)
    return {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "rng": torch.get_rng_state(),
        "val": trainer.callback_metrics["val_loss"],
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(3, 16),
        lambda: nn.GRU(3, 8, bidirectional=True),
        lambda: nn.RNN(3, 16, nonlinearity="relu"),
        lambda: nn.LSTM(3, 16, num_layers=2, dropout=0.5),
    ],
    ids=["LSTM", "GRU", "RNN", "dropout"],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_monitoring_changes_no_bit(tmp_path: Path, make: Any, precision: Any) -> None:
    def model() -> Reader:
        torch.manual_seed(1)
        return Validated(make())

    settings = {"precision": precision, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    without = final(tmp_path, model(), **settings)
    every_step = GradientMonitor(exact_every_n_steps=1, preflight=True)
    assert_same_bits(final(tmp_path, model(), every_step, **settings), without)
    assert {r.source for r in every_step.time_readings} == {"exact"}
    for reading in every_step.time_readings:
        # The reverse direction has read one timestep only when the loss takes its output.
        assert math.isfinite(reading.decay_rate) or reading.part == "l0_reverse"


def test_an_error_inside_a_hook_ends_the_watching_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("lightning_gradguard.measure._recurrent_calls.feature_norms", broken)
    guard, model = GradGuard(), Reader()
    with caplog.at_level(logging.ERROR, "lightning_gradguard"):
        quiet_trainer(tmp_path, guard).fit(model, loader(batches(5)))
    assert [r.getMessage() for r in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "stops watching gradients through time" in caplog.records[0].getMessage()
    assert len(guard.history) == 5
    assert not guard.broken
    assert hooks_of(model) == 0


def test_a_preflight_that_is_not_possible_is_left_out_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Manual(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    guard = GradGuard(preflight=True)
    with caplog.at_level(logging.WARNING, "lightning_gradguard"):
        quiet_trainer(tmp_path, guard).fit(Manual(), loader(batches(3)))
    assert "leaves out the preflight" in caplog.text
    assert [len(guard.history), guard.broken] == [3, False]


def test_a_preflight_that_fails_is_no_reason_not_to_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []  # not on the model, whose attributes a preflight puts back

    class Once(Reader):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(batch_idx)
            if len(calls) == 1:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    guard = GradGuard(preflight=True)
    quiet_trainer(tmp_path, guard).fit(Once(), loader(batches(3)))
    assert "leaves out the preflight: out of memory" in caplog.text
    assert [len(guard.history), guard.broken, guard.preflight_result] == [3, False, None]


@pytest.mark.parametrize("where", ["collect", "decode"])
def test_an_error_of_a_measurement_ends_the_watching_and_nothing_else(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    owner = {"collect": TimestepProbe, "decode": Snapshot}[where]
    model = nn.LSTM(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = GuardEngine(model, optimizer)
    monkeypatch.setattr(owner, where, broken)
    with caplog.at_level(logging.ERROR, "lightning_gradguard"):
        train(model, optimizer, engine, 4)
    assert len(engine.history) == 4
    assert ["stops watching" in r.getMessage() for r in caplog.records] == [True]
    assert hooks_of(model) == 0


def test_a_state_of_another_version_is_not_understood_and_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def make() -> tuple[nn.LSTM, Any, GuardEngine]:
        model = nn.LSTM(3, 8)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return model, optimizer, GuardEngine(model, optimizer)

    model, optimizer, engine = make()
    train(model, optimizer, engine, 4)
    state = engine.state_dict()
    state = {"step": state["step"], "pipeline": {"detectors": {}}}  # as before there was a version
    model, optimizer, engine = make()
    engine.load_state_dict(state)
    train(model, optimizer, engine, 5)
    assert [row.step for row in engine.history] == [4, 5, 6, 7, 8]
    assert [r.getMessage() for r in caplog.records if "starts afresh" in r.getMessage()]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_resumed_runs_measure_at_the_same_steps(tmp_path: Path) -> None:
    data = batches(40)

    class ByStep(Reader):
        """Where a loader goes on after a resume is not what this is about."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(data[self.global_step], batch_idx)

    def fit(name: str, checkpoint: Path | None = None) -> GradGuard:
        guard = GradGuard(exact_every_n_steps=7)
        saver = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=20, save_top_k=-1)
        trainer = quiet_trainer(tmp_path, guard, saver, enable_checkpointing=True)
        trainer.fit(ByStep(), loader(data), ckpt_path=checkpoint)
        return guard

    whole = fit("whole")
    resumed = fit("resumed", tmp_path / "whole" / "step=20.ckpt")
    expected = [r.to_dict() for r in whole.time_readings if r.step >= 20]
    assert {r["step"] for r in expected} >= {21, 28, 35}
    assert_same_bits([r.to_dict() for r in resumed.time_readings], expected)
    assert_same_bits(resumed.state_dict(), whole.state_dict())


def test_late_readings_survive_a_checkpoint() -> None:
    """Fused optimizers: what is read two steps later is neither lost nor read twice."""

    def run(stops: int | None) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.LSTM(3, 8)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        engine = GuardEngine(model, optimizer, exact_every_n_steps=3)
        read: list[dict[str, Any]] = []
        for step, (inputs, _) in enumerate(batches(12)):
            if step == stops:
                read += [r.to_dict() for r in engine.time_readings]
                state = json.loads(json.dumps(engine.state_dict()))
                engine.abort()
                engine = GuardEngine(model, optimizer, exact_every_n_steps=3)
                engine.load_state_dict(state)
            optimizer.zero_grad()
            loss = model(inputs)[0][-1].square().mean()
            loss.backward()
            engine.before_step(loss)
            optimizer.step()
        engine.close()
        return read + [r.to_dict() for r in engine.time_readings]

    whole = run(None)
    assert [r["step"] for r in whole] == [0, 3, 6, 9]
    for stops in (4, 7, 8):
        assert_same_bits(run(stops), whole)
