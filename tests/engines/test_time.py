"""Gradients through time in real Lightning runs: measured, logged, resumed, taken off again."""

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
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_gradguard import GradGuard, GradientMonitor, GuardEngine
from lightning_gradguard.measure import TimestepProbe, recurrent_adjoint
from lightning_gradguard.measure.timesteps import Snapshot
from tests.distributed import run_on_ranks
from tests.engines.test_ddp import launched
from tests.models import assert_same_bits, loader, quiet_trainer

T, B = 24, 6


class Reader(LightningModule):
    """Says whether the first input of a sequence was positive."""

    def __init__(self, rnn: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.rnn = nn.LSTM(3, 16) if rnn is None else rnn
            self.head = nn.Linear(16, 1)
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        output, _ = self.rnn(inputs)
        return nn.functional.binary_cross_entropy_with_logits(self.head(output[-1]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


class Validated(Reader):
    """The same with a validation loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=B)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(T, B, 3, generator=generator) for _ in range(count)]
    return [(x, (x[0, :, :1] > 0).float()) for x in inputs]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_rate_is_that_of_the_adjoint_of_the_real_step(tmp_path: Path) -> None:
    model, data = Reader(), batches(1)
    expected = Reader()
    inputs, labels = data[0]
    output, _ = expected.rnn(inputs)
    output.retain_grad()
    nn.functional.binary_cross_entropy_with_logits(expected.head(output[-1]), labels).backward()
    adjoint = recurrent_adjoint(expected.rnn, inputs, grad_output=output.grad)
    guard = GradGuard()
    quiet_trainer(tmp_path, guard).fit(model, loader(data))
    (reading,) = guard.time_readings
    assert (reading.name, reading.source, reading.step) == ("rnn/l0", "exact", 0)
    assert reading.decay_rate == pytest.approx(adjoint.gain[0].log().mean().item(), rel=1e-4)
    profile = adjoint.hidden[0].square().sum(-1).mean(-1).sqrt()
    assert reading.profile == pytest.approx(profile.tolist(), rel=1e-4)


def test_exact_now_and_then_and_cheap_in_between(tmp_path: Path) -> None:
    guard = GradGuard(exact_every_n_steps=60)
    quiet_trainer(tmp_path, guard).fit(Reader(), loader(batches(130)))
    read = {reading.step: reading.source for reading in guard.time_readings}
    assert {step for step, source in read.items() if source == "exact"} >= {0, 60, 120}
    assert {step for step, source in read.items() if source == "input"} == {50, 100}


def test_a_finding_asks_for_an_exact_measurement(tmp_path: Path) -> None:
    data = batches(40)
    data[30][0][0, 0, 0] = math.nan
    monitor = GradGuard()
    quiet_trainer(tmp_path, monitor).fit(Reader(), loader(data))
    assert {f.step for f in monitor.findings} == {30}
    assert 31 in {r.step for r in monitor.time_readings if r.source == "exact"}


def test_keys_of_one_and_of_several_layers(tmp_path: Path) -> None:
    for rnn, names in ((None, {"rnn"}), (nn.GRU(3, 16, num_layers=2), {"rnn/l0", "rnn/l1"})):
        log = CSVLogger(tmp_path, name=f"{len(names)}")
        trainer = quiet_trainer(tmp_path, GradGuard(), logger=log, log_every_n_steps=1)
        trainer.fit(Reader(rnn), loader(batches(3)))
        keys = {key for key in trainer.callback_metrics if key.startswith("grad_time/")}
        each = (
            "decay_rate",
            "half_life",
            "horizon",
            "recency",
            "decay_rate_epoch",
            "horizon_epoch",
        )
        assert keys == {f"grad_time/{name}/{key}" for name in names for key in each}


def test_epochs_have_statistics_of_their_own(tmp_path: Path) -> None:
    guard = GradGuard(exact_every_n_steps=5)
    quiet_trainer(tmp_path, guard, max_epochs=2).fit(Reader(), loader(batches(20)))
    ((name, metric),) = guard.time_statistics.items()
    last = [r.decay_rate for r in guard.time_readings if r.part and r.step >= 20]
    assert name == "rnn/l0"
    assert metric.compute()["count"] == len(last) == 4
    assert metric.compute()["decay_rate"].item() == pytest.approx(sum(last) / 4, rel=1e-6)


def test_the_report_has_a_table(tmp_path: Path) -> None:
    guard = GradGuard()
    quiet_trainer(tmp_path, guard).fit(Reader(), loader(batches(2)))
    table = guard.report().split("How far the gradient reaches back through time:")[1]
    assert "rnn/l0" in table
    assert f"of {T}" in table or f"all {T}" in table


@pytest.mark.parametrize("make", [GradGuard, GradientMonitor])
def test_a_misspelled_module_is_an_error_before_the_first_step(tmp_path: Path, make: Any) -> None:
    model = Reader()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="'rrn', which matches none; nearest: 'rnn'"):
        quiet_trainer(tmp_path, make(timesteps=["rrn"])).fit(model, loader(batches(2)))
    assert_same_bits(dict(model.named_parameters()), before)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("bad", ["all", 3, {"rnn": "1"}])
def test_other_bad_arguments_are_errors_too(tmp_path: Path, bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"timesteps|time axis"):
        quiet_trainer(tmp_path, GradGuard(timesteps=bad)).fit(Reader(), loader(batches(2)))


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


def test_what_cannot_be_watched_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lightning_gradguard"):
        guard = GradGuard(timesteps={"head": 7}, exact_every_n_steps=1)
        quiet_trainer(tmp_path, guard).fit(Reader(), loader(batches(3)))
    said = [r.getMessage() for r in caplog.records if "Not watched through time" in r.getMessage()]
    assert said == [
        "Not watched through time: the output of 'head' has 2 dimensions, and so no time axis 7."
    ]
    assert guard.time_readings == []


def test_no_watching_if_not_wanted(tmp_path: Path) -> None:
    class Watcher(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(hooks_of(module))

    seen: list[int] = []
    guard = GradGuard(timesteps=None)
    quiet_trainer(tmp_path, guard, Watcher()).fit(Reader(), loader(batches(2)))
    assert seen == [0, 0]
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


def test_each_optimizer_measures_its_own_modules(tmp_path: Path) -> None:
    class Two(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.GRU(3, 16)

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer, rnn in zip(self.optimizers(), (self.rnn, self.other), strict=True):
                optimizer.zero_grad()
                self.manual_backward(rnn(batch[0])[0][-1].square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(rnn.parameters(), 0.1) for rnn in (self.rnn, self.other)]

    guard = GradGuard()
    quiet_trainer(tmp_path, guard).fit(Two(), loader(batches(3)))
    assert [[r.name for r in e.time_readings] for e in guard.engines] == [["rnn/l0"], ["other/l0"]]


def test_preflight_says_what_it_sees_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = GradGuard(preflight=True)
    quiet_trainer(tmp_path, guard).fit(Reader(), loader(batches(3)))
    assert "rnn/l0" in capsys.readouterr().out
    assert guard.preflight_result is not None
    assert [r.name for r in guard.preflight_result.time] == ["rnn/l0"]
    assert guard.time_readings[0].sequences == B  # what the preflight has seen does not count


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


def test_gradients_in_validation_are_not_those_of_training(tmp_path: Path) -> None:
    class Attacked(Reader):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                inputs = batch[0][:5].requires_grad_()
                torch.autograd.grad(self.rnn(inputs)[0].square().sum(), inputs)

    guard, data = GradGuard(exact_every_n_steps=1), loader(batches(4))
    quiet_trainer(tmp_path, guard, val_check_interval=1).fit(Attacked(), data, data)
    assert [(r.step, r.source, r.timesteps) for r in guard.time_readings] == [
        (step, "exact", T) for step in range(4)
    ]


def test_evaluation_does_not_end_the_watching_of_attention(tmp_path: Path) -> None:
    class Encoder(Reader):
        def __init__(self) -> None:
            super().__init__(nn.TransformerEncoderLayer(16, 2, 16))
            self.embed = nn.Linear(3, 16)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = self.rnn(self.embed(batch[0]))
            return nn.functional.binary_cross_entropy_with_logits(self.head(hidden[-1]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    guard, data = GradGuard(exact_every_n_steps=3), loader(batches(8))
    quiet_trainer(tmp_path, guard, val_check_interval=1).fit(Encoder(), data, data)
    assert [r.step for r in guard.time_readings] == [0, 3, 6]


def train(model: Any, optimizer: Any, engine: GuardEngine, steps: Any, change: Any = None) -> None:
    for step, (inputs, _) in enumerate(batches(steps)):
        if change is not None:
            change(step)
        optimizer.zero_grad()
        loss = model(inputs)[0][-1].square().mean()
        loss.backward()
        engine.before_step(loss)
        optimizer.step()
    engine.close()


def test_modules_whose_parameters_are_added_later_are_watched() -> None:
    model = nn.ModuleDict({"first": nn.LSTM(3, 8), "second": nn.GRU(8, 4)})
    optimizer = torch.optim.SGD(model["first"].parameters(), 0.1)
    engine = GuardEngine(model, optimizer, exact_every_n_steps=1)

    def both(inputs: Tensor) -> Any:
        return model["second"](model["first"](inputs)[0])

    def add(step: int) -> None:
        if step == 2:
            optimizer.add_param_group({"params": model["second"].parameters()})

    assert engine.watched_in_time == ("first",)
    train(both, optimizer, engine, 5, add)
    assert engine.watched_in_time == ("first", "second")
    assert {r.step for r in engine.time_readings if r.module == "second"} == {3, 4}
    assert hooks_of(model) == 0


def test_modules_that_nobody_trains_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class HeadOnly(Reader):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.head.parameters(), 0.1)

    with caplog.at_level(logging.WARNING, "lightning_gradguard"):
        guard = GradGuard(timesteps=["rnn"])
        quiet_trainer(tmp_path, guard).fit(HeadOnly(), loader(batches(2)))
    assert "timesteps=['rnn'] names no module that an optimizer trains" in caplog.text


def test_a_cheap_reading_that_has_drifted_asks_for_an_exact_one() -> None:
    model = nn.LSTM(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    engine = GuardEngine(model, optimizer, mode="observe")

    def forget(step: int) -> None:
        if step == 160:
            with torch.no_grad():
                model.bias_hh_l0[8:16] = -3.0

    train(model, optimizer, engine, 260, forget)
    exact = [r.step for r in engine.time_readings if r.source == "exact"]
    assert exact == [0, 201]
    rates = {r.step: r.decay_rate for r in engine.time_readings}
    assert rates[201] < 2 * rates[0] < 0


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


def test_a_state_from_before_there_was_time() -> None:
    def make() -> tuple[nn.LSTM, Any, GuardEngine]:
        model = nn.LSTM(3, 8)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return model, optimizer, GuardEngine(model, optimizer)

    model, optimizer, engine = make()
    train(model, optimizer, engine, 4)
    state = engine.state_dict()
    del state["time"]
    for late in state["late"]:
        del late["time"]
    model, optimizer, engine = make()
    engine.load_state_dict(state)
    train(model, optimizer, engine, 3)
    assert engine.history[-1].step == 6


def test_profiles_are_those_of_the_loss_and_not_of_the_scaled_one() -> None:
    def profile(scale: float) -> tuple[float, ...]:
        torch.manual_seed(0)
        model = nn.LSTM(3, 8)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        engine = GuardEngine(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        loss = model(batches(1)[0][0])[0][-1].square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        engine.before_step(loss, scaler=scaler)
        scaler.step(optimizer)
        engine.close()
        return engine.time_readings[0].profile

    assert profile(1024.0) == pytest.approx(profile(1.0), rel=1e-5)


def train_on_ranks(root: str) -> tuple[int, list[tuple[int, str]], bool, list[float]]:
    launched()
    guard = GradGuard(exact_every_n_steps=2)
    model = Reader(lr=1e-2)
    gloo = DDPStrategy(process_group_backend="gloo")
    trainer = quiet_trainer(root, guard, strategy=gloo, devices=2, use_distributed_sampler=False)
    trainer.fit(model, loader(batches(6)[torch.distributed.get_rank() :: 2]))
    weights = [p.sum().item() for p in model.parameters()]
    read = [(r.step, r.name) for r in guard.time_readings]
    return trainer.world_size, read, guard.broken, weights


@pytest.mark.slow
def test_under_ddp_every_rank_reads_its_own_sequences(tmp_path: Path) -> None:
    first, second = run_on_ranks(train_on_ranks, 2, str(tmp_path))
    assert first[0] == second[0] == 2
    assert first[1] == second[1] == [(0, "rnn/l0"), (2, "rnn/l0")]
    assert first[2:] == second[2:]
    assert not first[2]
