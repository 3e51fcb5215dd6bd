"""Trainers that take turns, and what their times are turned into."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule

from benchmarks.overhead.contenders import CONTENDERS, LOG_EVERY_N_STEPS
from benchmarks.overhead.timing import Ratios, Schedule, compare
from benchmarks.overhead.turns import Runner, Turn
from benchmarks.overhead.workloads import Workload, counting_workload


@pytest.fixture
def workload() -> Workload:
    return counting_workload(4)


def _runner(workload: Workload, name: str, directory: Path) -> Runner:
    module = workload.make_module("sgd")
    trainer = CONTENDERS[name].make_trainer(module, directory / name, "cpu")
    return Runner(trainer, module, workload.make_batches("cpu"))


def test_nobody_trains_but_the_one_whose_turn_it_is(workload, tmp_path) -> None:
    first, second = (_runner(workload, "bare", tmp_path / n) for n in "ab")
    first.take_turn(5)
    start = first.trainer.global_step
    second.take_turn(7)
    assert first.trainer.global_step == start

    turn = first.take_turn(3)

    assert first.trainer.global_step == start + 3
    assert turn.wall > 0.0
    assert turn.cpu > 0.0
    first.stop()
    second.stop()


def test_a_turn_knows_whether_values_were_logged_in_it(workload, tmp_path) -> None:
    runner = _runner(workload, "bare", tmp_path)
    runner.take_turn(11)  # one batch is fetched ahead

    logged = [runner.take_turn(10).logs for _ in range(8)]

    assert LOG_EVERY_N_STEPS == 50
    assert logged == [False, False, False, True, False, False, False, False]
    runner.stop()


def test_anomaly_detection_of_one_does_not_slow_down_the_others(workload, tmp_path) -> None:
    runner = _runner(workload, "detect_anomaly", tmp_path)
    runner.take_turn(2)
    assert not torch.is_anomaly_enabled()
    seen = []
    runner.trainer.strategy.lightning_module.on_train_batch_start = lambda *_: seen.append(
        torch.is_anomaly_enabled()
    )

    runner.take_turn(2)

    assert seen == [True, True]
    runner.stop()
    assert not torch.is_anomaly_enabled()


def test_an_error_in_a_fit_reaches_the_one_who_gives_turns(workload, tmp_path) -> None:
    class Failing(LightningModule):
        def training_step(self, batch):
            raise RuntimeError("out of luck")

        def configure_optimizers(self):
            return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)

    module = Failing()
    trainer = CONTENDERS["bare"].make_trainer(module, tmp_path, "cpu")
    runner = Runner(trainer, module, workload.make_batches("cpu"))

    with pytest.raises(RuntimeError, match="out of luck"):
        runner.take_turn(3)


def test_ratios_are_of_neighbors_and_logging_is_kept_apart() -> None:
    ratios = Ratios()
    for bare, factor in ((1.0, 1.1), (10.0, 1.2), (100.0, 1.3)):
        ratios.add(Turn(factor * bare, 2 * bare, False), Turn(bare, bare, False))
    ratios.add(Turn(9.0, 9.0, True), Turn(3.0, 3.0, False))

    wall = ratios.summary("wall", steps=5)

    assert wall["median"] == pytest.approx(1.2)
    assert wall["turns"] == 3
    assert wall["quartiles"] == pytest.approx([1.1, 1.3])
    assert wall["with_logging"] == pytest.approx(0.9 * 1.2 + 0.1 * 3.0)
    assert ratios.summary("cpu", steps=5)["median"] == pytest.approx(2.0)


def test_everybody_is_measured_in_every_round_and_no_thread_is_left(workload, tmp_path) -> None:
    before = threading.active_count()
    names = ["bare", "gradient_clip_val", "GradGuard", "AGC"]

    results = compare(
        workload,
        [CONTENDERS[name] for name in names],
        Schedule(warm_steps=3, rounds=4, steps=2),
        optimizer="adamw",
        device="cpu",
        directory=tmp_path,
        say=lambda line: None,
    )

    assert list(results) == names[1:]
    assert {len(ratios.pairs) for ratios in results.values()} == {4}
    assert threading.active_count() == before
