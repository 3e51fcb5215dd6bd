"""A run that bears large updates is left alone, to the bit; one that does not is put back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_gradguard import GuardEngine
from lightning_gradguard.respond import ActionKind, UpdateCap, WeightRollback
from tests.guard.loops import Loop
from tests.models import Regression, assert_same_bits, make_batches

BATCHES = make_batches(60)
OFF = dict.fromkeys(("clip", "cap", "skip", "backoff", "rollback"))
Make = Callable[..., Optimizer]


def adamw(lr: float, *, fused: bool = False) -> Make:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=fused)


def sgd(lr: float, *, fused: bool = False) -> Make:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=fused)


def adafactor(lr: float) -> Make:
    return lambda parameters: torch.optim.Adafactor(parameters, lr=lr)


def trained(make: Make, **arguments: Any) -> Loop:
    loop = Loop(make, **arguments).run(BATCHES)
    loop.guard.close()
    return loop


BEARS = {
    "adamw": adamw(0.1),
    "fused adamw": adamw(0.1, fused=True),
    "adafactor": adafactor(0.3),
}
BREAKS = {
    "adamw": adamw(1.0),
    "fused adamw": adamw(1.0, fused=True),
    "sgd": sgd(0.5),
    "fused sgd": sgd(0.5, fused=True),
}


@pytest.mark.parametrize("make", BEARS.values(), ids=BEARS)
def test_large_updates_that_the_run_bears_change_no_bit(make: Make) -> None:
    guarded, plain, strict = trained(make), trained(make, **OFF), trained(make, cap=UpdateCap())
    assert_same_bits(guarded.weights(), plain.weights())
    assert guarded.guard.actions == []
    assert all(row.capped_tensors == 0 for row in guarded.guard.history)
    assert sum(row.capped_tensors > 0 for row in strict.guard.history) > 50  # large they are


@pytest.mark.parametrize("make", BREAKS.values(), ids=BREAKS)
def test_those_that_it_does_not_bear_are_undone_and_bounded(make: Make) -> None:
    loop = Loop(make)
    first = loop.weights()
    for batch in BATCHES:
        loop.step(batch)
        if loop.guard.actions:
            break
    assert [action.kind for action in loop.guard.actions] == [ActionKind.ROLL_BACK]
    assert loop.guard.actions[0].numbers["to_step"] == 0
    late = 2 if loop.optimizer.defaults["fused"] else 0
    assert loop.guard.actions[0].step + late == loop.guard.step - 1 < 10
    assert_same_bits(loop.weights(), first)
    loop.run(BATCHES).guard.close()
    ratios = [row.max_ratio for row in loop.guard.history[-50:]]
    assert max(ratios) <= UpdateCap().widest_ratio
    losses = [row.loss for row in loop.guard.history]
    assert max(losses[-10:]) < losses[0]  # without the guard it is beyond 1e3 or NaN


def test_a_loss_that_is_not_told_leaves_the_cap_as_it_was() -> None:
    loop = Loop(adamw(0.1))
    for inputs, targets in BATCHES[:10]:
        loop.optimizer.zero_grad()
        loop.model.loss((inputs, targets)).backward()
        loop.guard.before_step()
        loop.optimizer.step()
    loop.guard.close()
    assert all(row.capped_tensors > 0 for row in loop.guard.history[1:])


@pytest.mark.parametrize(
    ("rnn", "expected"),
    [
        (nn.RNN(3, 4, nonlinearity="relu"), UpdateCap().first_ratio),
        (nn.RNN(3, 4), math.inf),
        (nn.GRU(3, 4), math.inf),
    ],
)
def test_only_a_relu_rnn_is_held_from_the_first_step_on(rnn: nn.Module, expected: float) -> None:
    guard = GuardEngine(rnn, torch.optim.AdamW(rnn.parameters(), lr=1e-3))
    assert guard._pipeline.plan.max_ratio == expected


# -- what a loss cannot tell ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [adamw(0.05), sgd(0.05)], ids=["adamw", "sgd"])
def test_who_maximizes_is_judged_by_what_is_to_fall(make: Make) -> None:
    """The same run, by the negative of its loss."""

    def maximizing(parameters: Any) -> Optimizer:
        optimizer = make(parameters)
        optimizer.param_groups[0]["maximize"] = True
        return optimizer

    falls, rises = Loop(make), Loop(maximizing)
    for loop, sign in ((falls, 1.0), (rises, -1.0)):
        for batch in BATCHES:
            loop.optimizer.zero_grad()
            loss = sign * loop.model.loss(batch)
            loss.backward()
            loop.guard.before_step(loss)
            loop.optimizer.step()
        loop.guard.close()
    assert_same_bits(rises.weights(), falls.weights())
    assert [a.kind for a in rises.guard.actions] == [a.kind for a in falls.guard.actions]
    assert [row.loss for row in rises.guard.history] == [-row.loss for row in falls.guard.history]
    found = [{f.pathology for f in loop.guard.findings} for loop in (rises, falls)]
    assert found[0] == found[1]


def test_in_a_game_a_loss_that_rises_is_no_evidence() -> None:
    """One player of two: its weights are neither put back nor capped."""
    alone, player = Loop(adamw(1.0)), Loop(adamw(1.0), optimizers=2)
    plain = Loop(adamw(1.0), **OFF)
    for loop in (alone, player, plain):
        for batch in BATCHES[:20]:
            loop.step(batch)
    assert alone.guard.counts["rollbacks"] == 1
    assert player.guard.actions == []
    assert_same_bits(player.weights(), plain.weights())


# -- tensors that do not move ---------------------------------------------------------------------


def fine_tuned(make: Make, still: str) -> Loop:
    loop = Loop(model=Tall(make, still)).run(BATCHES)
    loop.guard.close()
    return loop


class Tall(Regression):
    """Only its head moves: the rest is frozen, has no rate, or is not in the optimizer."""

    def __init__(self, make: Make, still: str) -> None:
        super().__init__(make)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            width = self.head.in_features
            self.body = nn.Sequential(self.body, *(nn.Linear(width, width) for _ in range(8)))
        self.still = still
        if still == "frozen":
            self.body.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        head = {"params": list(self.head.parameters())}
        if self.still == "left out":
            return self.make_optimizer([head])
        body = {"params": list(self.body.parameters())}
        return self.make_optimizer([head, {**body, "lr": 0.0} if self.still == "no rate" else body])


@pytest.mark.parametrize("still", ["frozen", "no rate"])
@pytest.mark.parametrize("make", [adamw(10.0), sgd(3.0)], ids=["adamw", "sgd"])
def test_a_head_is_judged_by_itself(make: Make, still: str) -> None:
    alone, among = fine_tuned(make, "left out"), fine_tuned(make, still)
    for loop in (alone, among):
        assert loop.guard.counts["rollbacks"] == 1
        assert loop.guard.counts["capped_steps"] > 0
    first, second = ([row.capped_tensors for row in loop.guard.history] for loop in (alone, among))
    assert first == second


def test_weights_that_can_no_longer_be_copied_end_the_trust() -> None:
    """The first copy fits, and with the optimizer's state the second one does not."""
    size = sum(p.numel() * p.element_size() for p in Regression().parameters())
    rollback = WeightRollback(every_n_steps=5, max_bytes=3 * size)
    loop = Loop(adamw(0.1), rollback=rollback).run(BATCHES[:20])
    loop.guard.close()
    ratios = [row.max_ratio for row in loop.guard.history]
    assert set(ratios[:5]) == {math.inf}
    assert max(ratios[7:]) <= UpdateCap().widest_ratio
