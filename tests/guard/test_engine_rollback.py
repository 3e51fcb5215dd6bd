"""A run that is lost goes back to weights that were healthy, and goes on from there."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import GuardEngine, Pathology
from lightning_gradguard.respond import (
    Action,
    ActionKind,
    LearningRateBackoff,
    SkipBadSteps,
    UpdateCap,
    WeightRollback,
)
from tests.distributed import run_on_ranks
from tests.guard.loops import MAKERS, Loop, rmsprop
from tests.measure.dispatch import OperationLog
from tests.models import Batch, assert_same_bits, make_batches

OPTIMIZERS = pytest.mark.parametrize(
    "make_optimizer", [*MAKERS.values(), rmsprop], ids=[*MAKERS, "rmsprop"]
)
EVERY = WeightRollback(every_n_steps=10)


def poison(loop: Loop, value: float = math.nan) -> None:
    with torch.no_grad():
        loop.model.head.weight[0, 0] = value


def is_finite(loop: Loop) -> bool:
    return all(p.isfinite().all() for p in loop.model.parameters())


def rollbacks(loop: Loop) -> list[Action]:
    return [a for a in loop.guard.actions if a.kind is ActionKind.ROLL_BACK]


def everything(loop: Loop) -> Any:
    return copy.deepcopy([loop.model.state_dict(), loop.optimizer.state_dict()["state"]])


# -- weights that are not finite -------------------------------------------------------------------


@OPTIMIZERS
@pytest.mark.parametrize("at", [1, 5, 10, 11, 33])
@pytest.mark.parametrize("skip", [SkipBadSteps(), None], ids=["skipping", "not skipping"])
def test_weights_that_become_nan_are_put_back(make_optimizer: Any, at: int, skip: Any) -> None:
    loop = Loop(make_optimizer, rollback=EVERY, skip=skip)
    batches = make_batches(60)
    loop.run(batches[:at])
    poison(loop)
    loop.run(batches[at:])
    loop.guard.close()
    assert is_finite(loop)
    (action,) = rollbacks(loop)
    assert action.step == at
    assert action.numbers["to_step"] == max(0, (at - 1) // 10 * 10 - 10)
    assert "weights are broken" in action.message
    assert loop.guard.counts["rollbacks"] == 1
    assert not loop.guard.should_stop
    losses = [row.loss for row in loop.guard.history]
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0]


@OPTIMIZERS
def test_everything_is_as_it_was_at_the_copy(make_optimizer: Any) -> None:
    backoff = LearningRateBackoff(recovery_steps=1000)
    loop = Loop(make_optimizer, rollback=EVERY, backoff=backoff)
    states = []
    batches = make_batches(40)
    for batch in batches[:25]:
        states.append(everything(loop))
        loop.step(batch)
    poison(loop)
    while not rollbacks(loop):
        loop.step(batches[0])
    assert_same_bits(everything(loop), states[10])
    rate = loop.optimizer.param_groups[0]["lr"]
    loop.run(batches[25:])
    assert loop.optimizer.param_groups[0]["lr"] == rate
    loop.guard.close()
    assert loop.guard.history[-1].lr_scale == 0.5


@OPTIMIZERS
def test_it_goes_back_to_before_the_first_step(make_optimizer: Any) -> None:
    """When there was no momentum: the kernels that then make it must not read what is not there."""
    loop = Loop(make_optimizer, rollback=EVERY, cap=None, clip=None)
    first = everything(loop)
    loop.run(make_batches(5))
    poison(loop)
    loop.run(make_batches(3))
    batches = make_batches(40, poisoned=(0,))
    loop.run(batches)
    assert loop.guard.active
    loop.guard.close()
    assert [a.numbers["to_step"] for a in rollbacks(loop)] == [0.0]
    assert not first[1]
    assert is_finite(loop)


def test_nan_in_a_weight_that_no_batch_touches_is_found_when_it_is_copied() -> None:
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        guard = GuardEngine(model, optimizer, rollback=EVERY)
        for step in range(40):
            if step == 25:
                with torch.no_grad():
                    model[0].weight[5] = math.nan
            optimizer.zero_grad()
            loss = model(torch.tensor([step % 5])).square().mean()
            loss.backward()
            guard.before_step(loss)
            optimizer.step()
        guard.close()
        assert guard.counts["skipped_steps"] == 0
        assert [(a.step, a.numbers["to_step"]) for a in guard.actions] == [(30, 20.0)]
        assert model[0].weight.isfinite().all()


def test_a_mask_of_infinities_is_no_damage() -> None:
    model = nn.Linear(3, 1)
    mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
    optimizer = torch.optim.AdamW([*model.parameters(), mask], lr=0.01)
    guard = GuardEngine(model, optimizer, rollback=EVERY)
    for step in range(30):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().mean() * (math.nan if step == 13 else 1.0)
        loss.backward()
        guard.before_step(loss)
        optimizer.step()
    assert [a.kind for a in guard.actions] == [ActionKind.SKIP]
    assert mask[1] == -math.inf


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_scaler_that_drops_steps_by_itself(fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    guard = GuardEngine(model, optimizer, rollback=EVERY)
    assert guard._keeper is not None
    restore, restored = guard._keeper.restore, []
    guard._keeper.restore = lambda: (restored.append(guard.step), restore())  # type: ignore[method-assign]
    for step in range(40):
        if step == 22:
            with torch.no_grad():
                model.weight[0, 0] = math.nan
        optimizer.zero_grad()
        bad_data = 22 <= step < 26
        loss = model(torch.randn(4, 8)).square().mean() * (math.inf if bad_data else 1.0)
        scaler.scale(loss).backward()
        if not fused:
            scaler.unscale_(optimizer)
        guard.before_step(loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    guard.close()
    assert model.weight.isfinite().all()
    assert [a.numbers["to_step"] for a in guard.actions if a.kind is ActionKind.ROLL_BACK] == [10]
    assert len(restored) == 1
    assert math.isfinite(guard.history[-1].total_norm)


# -- other reasons ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make_optimizer", MAKERS.values(), ids=MAKERS)
def test_a_run_that_has_left_its_best_level_is_put_back(make_optimizer: Any) -> None:
    """Weights that were ruined at one stroke, as by a user's own update: finite, and useless."""
    loop = Loop(make_optimizer, rollback=WeightRollback(every_n_steps=100), cap=None, clip=None)
    batches = make_batches(320)
    loop.run(batches[:210])
    before = loop.guard.history[-1].loss
    for group in loop.optimizer.param_groups:
        group["lr"] *= 1e-6  # it does not find back by itself
    with torch.no_grad():
        for p in loop.model.parameters():
            p.mul_(-30.0)
    loop.run(batches[210:])
    loop.guard.close()
    (action,) = rollbacks(loop)
    assert "diverging" in action.message
    assert action.numbers["to_step"] == 100
    assert loop.guard.history[-1].loss < 20 * before + 1.0
    assert Pathology.DIVERGING in {f.pathology for f in loop.guard.findings}


@pytest.mark.parametrize("make_optimizer", MAKERS.values(), ids=MAKERS)
def test_data_that_stays_bad_goes_back_three_times_and_stops(make_optimizer: Any) -> None:
    skip = SkipBadSteps(max_consecutive=5)
    loop = Loop(make_optimizer, rollback=EVERY, skip=skip, cap=UpdateCap())
    loop.run(make_batches(60, poisoned=range(25, 60)))
    loop.guard.close()
    assert loop.guard.should_stop
    assert is_finite(loop)
    kinds = [a.kind for a in loop.guard.actions if a.kind is not ActionKind.SKIP]
    assert kinds == [ActionKind.ROLL_BACK] * 3 + [ActionKind.STOP]
    assert {a.numbers["to_step"] for a in rollbacks(loop)} == {10.0}
    # Steps that were on their way when weights were put back are not held against these.
    assert rollbacks(loop)[0].step == 29


def test_the_next_step_begins_a_new_phase() -> None:
    loop = Loop(rollback=EVERY)
    phases: list[tuple[int, bool]] = []
    original = loop.guard._pipeline.take

    def take(outcome: Any, norms: Any, seen: Any) -> None:
        phases.append((outcome.number, seen.new_phase))
        original(outcome, norms, seen)

    loop.guard._pipeline.take = take  # type: ignore[method-assign]
    loop.run(make_batches(20))
    poison(loop)
    loop.run(make_batches(20))
    assert [number for number, new in phases if new] == [21]


# -- what it costs and what it leaves alone --------------------------------------------------------


@OPTIMIZERS
def test_a_healthy_run_is_not_changed_by_a_bit(make_optimizer: Any) -> None:
    batches = make_batches(60)
    cap = UpdateCap()
    loops = [Loop(make_optimizer, rollback=r, cap=cap).run(batches) for r in (EVERY, None)]
    for loop in loops:
        loop.guard.close()
    assert_same_bits(everything(loops[0]), everything(loops[1]))
    assert repr(loops[0].guard.history) == repr(loops[1].guard.history)


@OPTIMIZERS
def test_only_steps_with_a_copy_cost_anything(make_optimizer: Any) -> None:
    def counts(rollback: WeightRollback | None) -> list[int]:
        loop, result = Loop(make_optimizer, rollback=rollback, cap=UpdateCap()), []
        for batch in make_batches(45):
            with OperationLog() as log:
                loop.step(batch)
            result.append(len(log.names))
        return result

    more = [one - other for one, other in zip(counts(EVERY), counts(None), strict=True)]
    read = [step + 2 for step in (0, 10, 20, 30, 40)]  # on a fused optimizer, of the copy
    assert [step for step, extra in enumerate(more) if extra and step not in read] == [
        0,
        10,
        20,
        30,
        40,
    ]


def test_an_observer_copies_nothing() -> None:
    loop = Loop(mode="observe").run(make_batches(3))
    assert loop.guard._keeper is None
    assert loop.guard.counts["rollbacks"] == 0


def test_copies_are_given_up_with_the_guard() -> None:
    loop = Loop().run(make_batches(3))
    assert loop.guard._keeper is not None
    loop.guard.close()
    assert loop.guard._keeper is None


@pytest.mark.parametrize("make_optimizer", MAKERS.values(), ids=MAKERS)
def test_a_resumed_run_copies_at_its_first_healthy_step(make_optimizer: Any) -> None:
    batches = make_batches(60, poisoned=(23, 24))
    first = Loop(make_optimizer, rollback=EVERY, cap=UpdateCap()).run(batches[:23])
    second = Loop(make_optimizer, rollback=EVERY, cap=UpdateCap())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.guard.load_state_dict(first.guard.state_dict())
    keeper = second.guard._keeper
    assert keeper is not None
    newest = []
    for batch in batches[23:33]:
        second.step(batch)
        newest.append(keeper.newest)
    if second.guard._fused:  # it cannot know that the first step was bad
        assert newest[0] == 23
    else:
        assert newest[:4] == [None, None, None, 26]
    poison(second)
    second.run(batches[33:])
    second.guard.close()
    assert is_finite(second)
    assert len(rollbacks(second)) == 1


def test_a_model_that_is_too_large_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    rollback = WeightRollback(every_n_steps=2, max_bytes=1000)
    loop = Loop(rollback=rollback, skip=SkipBadSteps(max_consecutive=3)).run(make_batches(10))
    assert caplog.text.count("max_bytes") == 1
    loop.run(make_batches(3, poisoned=range(3)))
    assert loop.guard.should_stop
    assert not rollbacks(loop)


# -- it always ends, and ends with usable weights --------------------------------------------------

FAULTS = ("none", "nan gradient", "nan weights", "spike", "inf loss", "ruin")


def faults(plan: Sequence[tuple[str, int]]) -> Iterator[str]:
    for fault, times in plan:
        yield from [fault] * times


def faulty_step(loop: Loop, batch: Batch, fault: str) -> None:
    if fault == "nan weights":
        poison(loop)
    elif fault == "ruin":
        poison(loop, 1e4)
    scale = {"nan gradient": math.nan, "inf loss": math.inf, "spike": 1e6}.get(fault, 1.0)
    loop.step(batch, loss_scale=scale)


@pytest.mark.parametrize("name", ["adamw", "fused_adamw", "sgd", "fused_sgd"])
@given(
    plan=st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(1, 12)), max_size=8),
    last=st.sampled_from(["nan gradient", "nan weights", "inf loss"]),
)
@settings(max_examples=15, deadline=None)
def test_whatever_happens_it_ends_with_finite_weights(
    name: str, plan: list[tuple[str, int]], last: str
) -> None:
    rollback = WeightRollback(every_n_steps=4, max_rollbacks=2)
    skip = SkipBadSteps(max_consecutive=4)
    loop = Loop(MAKERS[name], rollback=rollback, skip=skip)
    batches = make_batches(120)
    loop.step(batches[0])  # whose weights are healthy
    for batch, fault in zip(batches, faults(plan), strict=False):
        faulty_step(loop, batch, fault)
        if loop.guard.should_stop:
            break
    # Everything is bad from now on: each budget is spent once more, and then the run is stopped.
    left = (rollback.max_rollbacks + 1) * (skip.max_consecutive + 3) + 8
    for batch in batches[:left]:
        if loop.guard.should_stop:
            break
        faulty_step(loop, batch, last)
    assert loop.guard.should_stop
    loop.guard.close()
    # The cap may put weights back once more, when it begins to hold.
    assert loop.guard.counts["rollbacks"] <= rollback.max_rollbacks + 1
    assert [a.kind for a in loop.guard.actions].count(ActionKind.STOP) == 1
    assert is_finite(loop)


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_that_does_not_stop_when_it_is_asked_to_keeps_finite_weights(name: str) -> None:
    loop = Loop(MAKERS[name], rollback=WeightRollback(every_n_steps=5, max_rollbacks=1))
    for number, batch in enumerate(make_batches(60)):
        faulty_step(loop, batch, "nan weights" if number >= 20 and number % 4 == 0 else "none")
    loop.guard.close()
    assert loop.guard.should_stop
    assert len(rollbacks(loop)) == 1
    assert is_finite(loop)


# -- several ranks ---------------------------------------------------------------------------------


def run_with_one_bad_rank(name: str, *, for_good: bool) -> dict[str, Any]:
    """A loop that averages gradients as DDP does; the fault is on the last rank alone."""
    loop = Loop(MAKERS[name], rollback=EVERY, skip=SkipBadSteps(max_consecutive=4))
    for number, (inputs, targets) in enumerate(make_batches(60)):
        half = slice(0, 4) if dist.get_rank() == 0 else slice(4, 8)
        if number == 25 and dist.get_rank() == 1:
            poison(loop)
        loop.optimizer.zero_grad()
        loss = loop.model.loss((inputs[half], targets[half]))
        if for_good and number >= 40 and dist.get_rank() == 1:
            loss = loss * math.nan
        loss.backward()
        for p in loop.model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        loop.guard.before_step(loss)
        loop.optimizer.step()
    loop.guard.close()
    return {
        "actions": [a.to_dict() for a in loop.guard.actions],
        "weights": [p.detach().tolist() for p in loop.model.parameters()],
        "stop": loop.guard.should_stop,
        "steps": len(loop.guard.history),
    }


CASES = [(name, for_good) for name in ("adamw", "fused_adamw", "sgd") for for_good in (False, True)]


def run_cases() -> list[dict[str, Any]]:
    return [run_with_one_bad_rank(name, for_good=for_good) for name, for_good in CASES]


@pytest.mark.slow
def test_a_weight_that_breaks_on_one_rank_is_put_back_on_all() -> None:
    results = zip(*run_on_ranks(run_cases, 2), strict=True)
    for (name, for_good), (first, second) in zip(CASES, results, strict=True):
        assert repr(first) == repr(second), name
        done = [a for a in first["actions"] if a["kind"] != "skip"]
        assert done[0]["kind"] == "roll_back"
        assert done[0]["numbers"]["to_step"] == 10
        assert torch.tensor(first["weights"][0]).isfinite().all()
        assert first["stop"] == for_good
        assert first["steps"] == 60, "the guard gave up"
