"""In training, what goes wrong is kept with its batch, and a run is what it would have been."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_gradguard import GradGuard, GradientMonitor
from lightning_gradguard.callbacks import moments as moments_module
from lightning_gradguard.guard import DEVICE_DELAY
from lightning_gradguard.incidents import (
    Incident,
    Incidents,
    list_incidents,
    read_incident,
    replay,
)
from tests.engines.test_ddp import Messages, both_ranks
from tests.engines.test_manual_optimization import Gan
from tests.engines.test_monitor_changes_nothing import final_state
from tests.engines.test_non_finite_origin import BAD, EXPECTED, Tagger, batches
from tests.models import (
    Regression,
    adamw,
    assert_same_bits,
    fused_adamw,
    loader,
    make_batches,
    quiet_trainer,
)

OPTIMIZERS = pytest.mark.parametrize(
    "make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__
)
WATCHERS = pytest.mark.parametrize("watcher", [GradGuard, GradientMonitor])


def kept(root: Path) -> list[Incident]:
    return [read_incident(path) for path in list_incidents(root / "gradguard" / "incidents")]


def fit(
    root: Path, model: Any, data: Any, *callbacks: Callback, **arguments: Any
) -> list[Incident]:
    torch.manual_seed(3)
    quiet_trainer(root, *callbacks, **arguments).fit(model, loader(data))
    return kept(root)


def messages(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    said = [r.getMessage() for r in caplog.records if r.name == "lightning_gradguard"]
    return [message for message in said if text in message]


class TakeWeights(Callback):
    """Those before the update of one step."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        if number == BAD:
            parameters = module.named_parameters()
            self.weights = {name: p.detach().clone() for name, p in parameters}


@WATCHERS
@pytest.mark.parametrize("fault", list(EXPECTED))
def test_a_step_that_is_not_finite_is_replayed(tmp_path: Path, fault: str, watcher: Any) -> None:
    take, guard = TakeWeights(), watcher()
    (incident,) = fit(tmp_path, Tagger(), batches(fault), take, guard)
    assert (incident.directory.name, incident.reason) == (str(BAD), "non_finite")
    (finding,) = guard.findings
    assert incident.manifest["finding"]["message"] == finding.message
    assert [row["step"] for row in incident.history()] == list(range(BAD + 1))
    assert incident.manifest["weights"]["step"] == BAD
    weights = incident.weights()
    assert_same_bits({name: weights[name] for name in take.weights}, take.weights)
    assert_same_bits(list(incident.batch()), list(batches(fault)[BAD]))
    result = replay(incident.directory, Tagger())
    assert result.origin is not None
    place, timestep = EXPECTED[fault]
    assert result.origin.place == fault
    assert result.origin.module == ("0" if place == "batch" else place)
    assert (result.origin.timestep, result.origin.sample) == (timestep, 2)
    assert result.notes == ()


@WATCHERS
def test_a_fused_optimizer_tells_later(tmp_path: Path, watcher: Any) -> None:
    (incident,) = fit(tmp_path, Tagger(fused_adamw), batches("forward"), watcher())
    assert incident.step == BAD
    assert incident.manifest["weights"]["step"] == BAD + DEVICE_DELAY + 1
    assert_same_bits(list(incident.batch()), list(batches("forward")[BAD]))
    result = replay(incident.directory, Tagger(fused_adamw))
    assert result.origin is not None
    assert (result.origin.module, result.origin.timestep) == ("body.log", 3)
    (note,) = result.notes
    assert f"those of {DEVICE_DELAY + 1} steps later" in note
    assert ("no longer finite" in note) == (watcher is GradientMonitor)


@pytest.mark.parametrize("step", [BAD, 7, 8])
def test_the_last_steps_of_a_fused_optimizer_are_not_lost(tmp_path: Path, step: int) -> None:
    (incident,) = fit(tmp_path, Tagger(fused_adamw), batches("batch", step), GradGuard())
    assert incident.step == step
    assert incident.manifest["replayable"]


@OPTIMIZERS
def test_a_monitored_run_ends_in_the_same_bits(tmp_path: Path, make_optimizer: Any) -> None:
    data = make_batches(24, poisoned=(15,))
    states = [
        final_state(tmp_path / name, Regression(make_optimizer, 0.2), data, *callbacks)
        for name, callbacks in {
            "bare": [],
            "monitor": [GradientMonitor(incidents=Incidents(weights=False))],
            "observe": [GradGuard("observe")],
        }.items()
    ]
    assert_same_bits(states[1], states[0])
    assert_same_bits(states[2], states[0])
    assert len(kept(tmp_path / "monitor")) == len(kept(tmp_path / "observe")) == 1


@OPTIMIZERS
def test_a_healthy_run_leaves_nothing(tmp_path: Path, make_optimizer: Any) -> None:
    assert fit(tmp_path, Regression(make_optimizer), make_batches(20), GradGuard()) == []
    assert list(tmp_path.rglob("incidents")) == []


@pytest.mark.parametrize("where", ["step", "after", "callback"])
@OPTIMIZERS
def test_an_exception_in_a_batch(tmp_path: Path, where: str, make_optimizer: Any) -> None:
    class Failing(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 4 and where == "step":
                raise IndexError("a label out of range")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args: Any) -> None:
            if args[2] == 4 and where == "after":
                raise IndexError("after the update")

    class Other(Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            if args[0].global_step == 4 and where == "callback":
                raise IndexError("in a callback")

    model = Failing(make_optimizer)
    with pytest.raises(IndexError):
        fit(tmp_path, model, make_batches(8), GradientMonitor(), Other())
    found = kept(tmp_path)
    if where == "after":  # by then the guard has let go of the batch
        assert found == []
        return
    (incident,) = found
    assert (incident.step, incident.reason) == (4, "exception")
    assert "IndexError" in incident.manifest["exception"]["type"]
    assert "raise IndexError" in incident.manifest["exception"]["traceback"]
    assert_same_bits(list(incident.batch()), list(make_batches(8)[4]))
    assert incident.manifest["weights"]["step"] == 4
    result = replay(incident.directory, Failing(make_optimizer))
    if where == "step":
        assert result.error.startswith("IndexError: a label out of range")
        assert "training_step" in incident.manifest["exception"]["traceback"]


def test_an_interruption_is_no_incident(tmp_path: Path) -> None:
    class Interrupted(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 4:
                raise SystemExit(3)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SystemExit):
        fit(tmp_path, Interrupted(), make_batches(8), GradGuard())
    assert kept(tmp_path) == []


@OPTIMIZERS
def test_a_divergence_is_kept_with_its_batch(tmp_path: Path, make_optimizer: Any) -> None:
    """The sign of the loss is turned in the middle of a run."""

    class Turned(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return loss if batch_idx < 150 else -3 * loss.clamp(max=1e6) + 6 * loss.detach()

    data = make_batches(400)
    found = fit(tmp_path, Turned(make_optimizer), data, GradientMonitor())
    assert found
    assert {incident.reason for incident in found} == {"diverging"}
    for incident in found:
        finding = incident.manifest["finding"]
        assert finding["pathology"] in ("diverging", "exploding")
        assert finding["step"] == incident.step
        assert_same_bits(list(incident.batch()), list(data[incident.step]))
        result = replay(incident.directory, Turned(make_optimizer))
        assert result.origin is None
        assert math.isfinite(result.total_norm)
        assert "step" in result.notes[0]


def test_incidents_of_a_run_are_bounded(tmp_path: Path) -> None:
    healthy, bad = make_batches(1), make_batches(1, poisoned=(0,))
    guard = GradGuard(incidents=Incidents(max_count=3))
    found = fit(tmp_path, Regression(), (bad + healthy * 40) * 6, guard)
    assert [incident.step for incident in found] == [0, 41, 5 * 41]


def test_one_episode_is_one_incident(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = fit(tmp_path, Regression(), make_batches(9, poisoned=(2, 3, 4)), GradGuard())
    assert [incident.step for incident in found] == [2]
    (said,) = messages(caplog, "is kept as an incident")
    command = f"gradguard replay {found[0].directory} --module tests.models:Regression"
    assert said.endswith(command)


def test_of_accumulated_batches_the_last_is_kept(tmp_path: Path) -> None:
    for make_optimizer in (adamw, fused_adamw):
        root = tmp_path / make_optimizer.__name__
        data = make_batches(12, poisoned=(5,))
        (incident,) = fit(
            root, Regression(make_optimizer), data, GradGuard(), accumulate_grad_batches=2
        )
        assert incident.step == 2
        assert_same_bits(list(incident.batch()), list(data[5]))


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_each_optimizer_has_its_own(tmp_path: Path, make_optimizer: Any) -> None:
    found = fit(tmp_path, Gan(make_optimizer, (5,)), make_batches(10), GradGuard())
    assert found
    assert {incident.directory.name.partition("-")[2] for incident in found} <= {
        "optimizer0",
        "optimizer1",
    }
    for incident in found:
        with pytest.raises(ValueError, match="loss must be given for Gan"):
            replay(incident.directory, Gan(make_optimizer))


def test_none_on_request_and_in_a_trial_run(tmp_path: Path) -> None:
    data = make_batches(6, poisoned=(0,))
    assert fit(tmp_path, Regression(), data, GradGuard(incidents=False)) == []
    assert fit(tmp_path, Regression(), data, GradGuard(), fast_dev_run=3) == []


@pytest.mark.parametrize("incidents", [1, None, "yes"])
@WATCHERS
def test_a_wrong_argument(watcher: Any, incidents: Any) -> None:
    with pytest.raises(TypeError, match="incidents must be an Incidents, True or False, got"):
        watcher(incidents=incidents)


@OPTIMIZERS
def test_a_full_disk_is_told_once_and_ends_nothing(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    make_optimizer: Any,
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    healthy, bad = make_batches(1), make_batches(1, poisoned=(0,))
    guard = GradGuard()
    assert fit(tmp_path, Regression(make_optimizer), (bad + healthy * 40) * 3, guard) == []
    (said,) = messages(caplog, "cannot be kept as an incident")
    assert "No space left on device" in said
    assert guard.counts["steps"] == 3 * 41
    assert not guard.broken
    assert list((tmp_path / "gradguard" / "incidents").iterdir()) == []


def test_a_batch_of_objects_is_said_not_to_be_replayable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Graph:
        pass

    class OfGraphs(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[0], batch_idx)

    data = [(batch, Graph()) for batch in make_batches(6, poisoned=(2,))]
    (incident,) = fit(tmp_path, OfGraphs(), data, GradGuard())
    assert not incident.manifest["replayable"]
    assert messages(caplog, "cannot be replayed, because batch.1 is a")


@OPTIMIZERS
def test_batches_are_not_copied_and_not_held_too_long(tmp_path: Path, make_optimizer: Any) -> None:
    class Ask(Callback):
        held: list[int] = []  # noqa: RUF012 - of this test
        same = True

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            self.same = self.same and guard._moments.current.batch is batch
            self.held.append(len(guard._moments._last))

    guard, ask = GradGuard(), Ask()
    fit(tmp_path, Regression(make_optimizer), make_batches(8), guard, ask)
    assert ask.same
    assert max(ask.held) == (1 if make_optimizer is adamw else 1 + DEVICE_DELAY)
    assert not guard._moments._last


def test_moments_know_the_batch_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        step = 0

    monkeypatch.setattr(moments_module.RandomState, "now", lambda device: None)
    engine: Any = Engine()
    module, moments = Regression(), moments_module.Moments(3)
    for number in range(10):  # two batches to a step
        engine.step = number // 2
        moments.remember(module, number, number, [engine])
    assert [getattr(moments.at(0, step), "batch", None) for step in range(6)] == [
        None,
        None,
        5,
        7,
        9,
        9,  # as a batch may take several steps by hand
    ]


class SpoilOneRank(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, number: int) -> None:
        if number == BAD and trainer.global_rank == 1:
            batch[1][2, 3] = 1e9


def _on_a_rank(root: str, mode: Any) -> list[str]:
    logger, spoken = logging.getLogger("lightning_gradguard"), Messages()
    torch.manual_seed(3)
    trainer = quiet_trainer(
        f"{root}/{mode}",
        SpoilOneRank(),
        GradGuard(mode),
        strategy="ddp",
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(Tagger(), loader(batches()))
    logger.removeHandler(spoken)
    said = [record.getMessage() for record in spoken.records]
    return [message.split(",")[0] for message in said if "is kept as an incident" in message]


@pytest.mark.slow
def test_of_several_processes_the_one_at_fault_keeps_its_batch(tmp_path: Path) -> None:
    modes = ("protect", "observe")
    results = both_ranks(_on_a_rank, tmp_path, *[(mode,) for mode in modes])
    for mode, (first, second) in zip(modes, results, strict=True):
        assert len(first) == len(second) == 1
        found = {incident.directory.name: incident for incident in kept(tmp_path / mode)}
        assert set(found) == {str(BAD), f"{BAD}-rank1"}
        assert replay(found[str(BAD)].directory, Tagger()).origin is None
        origin = replay(found[f"{BAD}-rank1"].directory, Tagger()).origin
        assert origin is not None
        assert (origin.module, origin.timestep, origin.sample) == ("body.log", 3, 2)
