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
from lightning_gradguard.respond import ActionKind, UpdateCap
from tests.guard.loops import Loop
from tests.models import assert_same_bits, make_batches

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
