"""Gradients through time in real Lightning runs: what is measured, logged and said."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_gradguard import GradGuard, GradientMonitor, GuardEngine
from lightning_gradguard.measure import recurrent_adjoint
from tests.distributed import run_on_ranks
from tests.engines.sequences import B, Reader, T, batches, hooks_of, train
from tests.engines.test_ddp import launched
from tests.models import assert_same_bits, loader, quiet_trainer


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
    table = str(guard.report()).split("How far the gradient reaches back through time:")[1]
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
