"""When layers are looked at, what survives a resume, and what never harms a run."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_gradguard.measure import NormMeter
from lightning_gradguard.readings import Inspection
from lightning_gradguard.sampling import LAYERS_EVERY_N_STEPS, LayerSampler
from tests.measure.test_activations import hooks_of
from tests.models import assert_same_bits

EARLY = [0, 1, 2, 4, 8, 16, 32, 40]


class Run:
    """A small run under a sampler."""

    def __init__(self, model: nn.Module | None = None, **settings: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.meter = NormMeter(self.model.named_parameters())
        self.sampler = LayerSampler(self.model, self.optimizer, **settings)

    def forward(self, step: int) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        self.model(x).square().mean().backward()

    def step(self, step: int) -> Inspection | None:
        self.forward(step)
        self.sampler.before_step(step, self.meter.measure())
        self.optimizer.step()
        self.sampler.after_step(step)
        return self.sampler.take(step)

    def steps(self, start: int, end: int) -> list[Inspection]:
        taken = [self.step(step) for step in range(start, end)]
        return [inspection for inspection in taken if inspection is not None]


def test_when_it_looks() -> None:
    inspections = Run().steps(0, 160)
    assert [inspection.step for inspection in inspections] == [*EARLY, 50, 100, 150]
    for inspection in inspections:
        assert [reading.used for reading in inspection.parameters] == [True] * 4
        assert all(reading.update_ratio > 0 for reading in inspection.parameters)
        watched = [reading.module for reading in inspection.activations]
        assert watched == (["1"] if inspection.step else [])


@pytest.mark.parametrize(("tensors", "factor"), [(250, 1), (252, 2), (1000, 4)])
def test_many_tensors_are_looked_at_less_often(tensors: int, factor: int) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(tensors // 2)))
    sampler = LayerSampler(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sampler.every_n_steps == factor * LAYERS_EVERY_N_STEPS
    looks = [step for step in range(401) if sampler.looks_at(step)]
    assert looks == EARLY + list(range(sampler.every_n_steps, 401, sampler.every_n_steps))


def test_on_other_steps_there_is_no_hook() -> None:
    run = Run()
    for step in range(40):
        assert (hooks_of(run.model) > 0) == (step in EARLY[1:])
        run.step(step)


@given(delay=st.integers(0, 6))
def test_an_inspection_is_due_some_steps_later(delay: int) -> None:
    run = Run(delay=delay)
    for step in range(12):
        inspection = run.step(step)
        due = step - delay if step - delay in EARLY else None
        assert (inspection.step if inspection else None) == due
    waiting = [step for step in EARLY if 12 - delay <= step < 12]
    assert [inspection.step for inspection in run.sampler.drain()] == waiting
    assert run.sampler.drain() == ()


def test_only_the_newest_is_taken() -> None:
    run = Run()
    for step in range(3):
        run.forward(step)
        run.sampler.before_step(step, run.meter.measure())
        run.sampler.after_step(step)
    inspection = run.sampler.take(2)
    assert inspection is not None
    assert inspection.step == 2
    assert run.sampler.take(3) is None


@pytest.mark.parametrize("again", [True, False])
def test_a_step_that_never_came_leaves_no_trace(again: bool) -> None:
    """Announced, and then dropped by a scaler (the next step follows) or by an exception."""
    run = Run()
    run.step(0)
    run.forward(1)
    run.sampler.before_step(1, run.meter.measure())
    following = 1 if again else 2
    before = [p.detach().clone() for p in run.model.parameters()]
    inspection = run.step(following)
    assert inspection is not None
    assert inspection.step == following
    for reading, old, new in zip(
        inspection.parameters, before, run.model.parameters(), strict=True
    ):
        floor = max(old.norm().item(), 0.1 * old.numel() ** 0.5)
        assert reading.update_ratio == pytest.approx((new - old).norm().item() / floor, rel=1e-4)
        assert reading.used is True
    run.sampler.after_step(following)  # of a step that was over
    assert run.sampler.take(following) is None


def test_evaluation_is_not_seen() -> None:
    run = Run()
    run.step(0)
    assert hooks_of(run.model) > 0
    run.sampler.pause()
    assert hooks_of(run.model) == 0
    run.model(torch.full((100, 4), 1e3))
    run.sampler.resume()
    inspection = run.step(1)
    assert inspection is not None
    assert inspection.activations[0].examples == 16


def test_accumulated_batches_are_one_look() -> None:
    run = Run()
    run.step(0)
    for number in range(3):
        run.model(torch.randn(5, 4, generator=torch.Generator().manual_seed(number)))
    run.sampler.discard()
    run.model(torch.randn(5, 4))
    inspection = run.step(1)
    assert inspection is not None
    assert inspection.activations[0].examples == 16 + 5


def test_a_resumed_run_sees_the_same() -> None:
    whole, part = Run(delay=2), Run(delay=2)
    expected = whole.steps(0, 60)
    found = part.steps(0, 3)
    state = pickle.loads(pickle.dumps(part.sampler.state_dict()))
    resumed = Run(part.model, delay=2)
    resumed.optimizer.load_state_dict(part.optimizer.state_dict())
    part.sampler.close()
    resumed.sampler.load_state_dict(state, 3)
    assert resumed.sampler.state_dict() == state or repr(resumed.sampler.state_dict()) == repr(
        state
    )
    found += resumed.steps(3, 60)
    assert repr(found) == repr(expected)


def test_added_groups_are_followed() -> None:
    run = Run()
    added = nn.Linear(2, 2)
    first = run.step(0)
    assert first is not None
    run.model.add_module("added", added)
    run.optimizer.add_param_group({"params": added.parameters()})
    run.model.forward = lambda x: added(run.model[2](run.model[1](run.model[0](x))).expand(-1, 2))
    run.meter = NormMeter(run.model.named_parameters())
    run.sampler.follow(run.optimizer)
    second = run.step(1)
    assert second is not None
    assert len(second.parameters) == len(first.parameters) + 2
    assert second.parameters[-1].update_ratio > 0


@pytest.mark.parametrize("where", ["forward", "before_step", "after_step", "take"])
def test_an_error_of_its_own_turns_only_it_off(
    where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, twin = Run(), Run()
    twin.sampler.close()
    inspector = run.sampler._inspector
    if where == "forward":
        monkeypatch.setattr(inspector.activations._watched[0], "kind", None)
    elif where == "before_step":
        monkeypatch.setattr(inspector, "_samples", None)
    elif where == "after_step":
        monkeypatch.setattr(inspector._updates, "_views", None)
    else:
        run.forward(0)
        run.sampler.before_step(0, run.meter.measure())
        run.sampler.after_step(0)
        object.__setattr__(run.sampler._late[0]._snapshot._begun, "known", ({},))
    with caplog.at_level(logging.ERROR, "lightning_gradguard"):
        assert where != "take" or run.sampler.take(0) is None
        for step in range(3):
            assert (run.step(step) is None) == (where != "forward" or step > 0)
            twin.step(step)
    (record,) = caplog.records
    assert "stops looking at single layers" in record.message
    assert not run.sampler.active
    assert hooks_of(run.model) == 0
    assert_same_bits(run.model.state_dict(), twin.model.state_dict())
    assert run.sampler.drain() == ()


def test_it_changes_no_bit() -> None:
    watched, alone = Run(), Run()
    alone.sampler.close()
    watched.steps(0, 55)
    alone.steps(0, 55)
    assert_same_bits(watched.model.state_dict(), alone.model.state_dict())
    assert_same_bits(watched.optimizer.state_dict(), alone.optimizer.state_dict())


def test_an_exception_in_the_model_leaves_hooks_that_close_takes_off() -> None:
    run = Run()
    with pytest.raises(RuntimeError):
        run.model(torch.ones(2, 3))
    run.sampler.close()
    assert hooks_of(run.model) == 0
    run.sampler.resume()
    assert hooks_of(run.model) == 0


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).tanh()


@pytest.mark.parametrize("way", ["function", "method"])
def test_compiled_models_stay_whole_and_are_not_compiled_again(way: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    run, twin = Run(Compiled()), Run(Compiled())
    twin.sampler.close()
    twin.model.load_state_dict(run.model.state_dict())
    call: Any = run.model
    if way == "method":
        run.model.compile(backend="aot_eager")
    else:
        call = torch.compile(run.model, backend="aot_eager")
    x = torch.randn(8, 4)
    for step in range(9):
        for each, forward in ((run, call), (twin, twin.model)):
            each.optimizer.zero_grad()
            forward(x).square().mean().backward()
            each.sampler.before_step(step, each.meter.measure())
            each.optimizer.step()
            each.sampler.after_step(step)
        assert (hooks_of(run.model) > 0) == (step == 0)  # one look shows that they see nothing
        inspection = run.sampler.take(step)
        if inspection is not None:
            assert [reading.used for reading in inspection.parameters] == [True] * 4
            assert inspection.activations == ()
    for ours, theirs in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]
    torch._dynamo.reset()


def test_a_bad_delay() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="delay must be an integer >= 0, got -1"):
        LayerSampler(model, torch.optim.SGD(model.parameters(), lr=0.1), delay=-1)


@pytest.mark.gpu
def test_a_sampled_step_reads_nothing_before_it_is_due() -> None:
    run = Run(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).cuda(), delay=2)
    x = torch.randn(16, 4, device="cuda")
    found = []
    for step in range(9):
        if step:  # the first look prepares
            torch.cuda.set_sync_debug_mode("error")
        try:
            run.optimizer.zero_grad()
            run.model(x).square().mean().backward()
            run.sampler.before_step(step, run.meter.measure())
            run.optimizer.step()
            run.sampler.after_step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        inspection = run.sampler.take(step)
        found += [] if inspection is None else [inspection.step]
    assert found == [0, 1, 2, 4]
