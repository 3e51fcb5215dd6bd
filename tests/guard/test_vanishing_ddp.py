"""Boosts on two real processes: both decide alike, so that their weights stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_gradguard import GuardEngine
from lightning_gradguard.respond import ActionKind, LayerBoost, VanishingRegularizer
from tests.distributed import run_on_ranks
from tests.guard.test_vanishing import adamw, deep, fused_adamw

pytestmark = pytest.mark.slow

STEPS = 80
FAILS_AT = 45
MAKERS = {"adamw": adamw, "fused_adamw": fused_adamw}


def train(name: str, stops_looking: bool) -> tuple[Any, ...]:
    """Weights at the end, what was boosted, and whether the guard is still on."""
    rank = dist.get_rank()
    model = deep(nn.Sigmoid)
    replica = DistributedDataParallel(model)
    optimizer = MAKERS[name](model.parameters())
    both = {"vanishing": VanishingRegularizer(), "boost": LayerBoost()}
    guard = GuardEngine(model, optimizer, timesteps=None, **both)
    generator = torch.Generator().manual_seed(rank)  # each has its own data
    for step in range(STEPS):
        x = torch.randn(32, 8, generator=generator)
        y = torch.randint(3, (32,), generator=generator)  # nothing to learn: the loss stays
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(replica(x), y)
        loss.backward()
        if stops_looking and rank == 1 and step == FAILS_AT:
            guard._samplers._layers.close()
        guard.before_step(loss)
        optimizer.step()
    boosted = [action.to_dict() for action in guard.actions if action.kind is ActionKind.BOOST]
    return [p.tolist() for p in model.parameters()], boosted, guard.active


@pytest.mark.parametrize("name", MAKERS)
def test_both_processes_boost_the_same_layers_by_the_same(name: str) -> None:
    (weights, boosted, active), other = run_on_ranks(train, 2, name, False)
    assert active
    assert boosted
    assert (weights, boosted, active) == other


@pytest.mark.parametrize("name", MAKERS)
def test_if_one_process_can_no_longer_look_both_guards_go_off_and_weights_agree(name: str) -> None:
    (weights, _, active), (other_weights, _, other_active) = run_on_ranks(train, 2, name, True)
    assert not active
    assert not other_active
    assert weights == other_weights
