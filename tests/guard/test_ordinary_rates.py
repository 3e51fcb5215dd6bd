"""Adam at an ordinary learning rate is left as it is; what is beyond is held back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer

from lightning_gradguard.respond import UpdateCap
from tests.guard.loops import Loop
from tests.models import assert_same_bits, make_batches

BATCHES = make_batches(40)


def adam_at(share: float, fused: bool = False) -> Callable[..., Optimizer]:
    """AdamW whose steps have, in the weight matrices, this share of the weights' size or more."""

    def make(parameters) -> Optimizer:
        parameters = list(parameters)
        size = max(float(p.detach().square().mean().sqrt()) for p in parameters if p.dim() > 1)
        return torch.optim.AdamW(parameters, lr=share * size, fused=fused)

    return make


def trained(share: float, fused: bool, **arguments) -> Loop:
    return Loop(adam_at(share, fused), **arguments).run(BATCHES)


OFF = dict.fromkeys(("clip", "cap", "skip", "backoff", "rollback"))


@pytest.mark.parametrize("fused", [False, True])
def test_a_rate_between_the_widest_and_the_largest_share_changes_no_bit(fused: bool) -> None:
    guarded = trained(0.09, fused, **{**OFF, "cap": UpdateCap(max_ratio=0.3, wide_ratio=0.05)})
    plain = trained(0.09, fused, **OFF)
    assert_same_bits(guarded.weights(), plain.weights())
    assert all(row.capped_tensors == 0 for row in guarded.guard.history)


@pytest.mark.parametrize("fused", [False, True])
def test_a_larger_one_is_held_to_the_share_that_opens(fused: bool) -> None:
    cap = UpdateCap()
    loop = Loop(adam_at(0.5, fused), **{**OFF, "cap": cap})
    for batch in BATCHES:
        ratio = loop.guard._pipeline.plan.max_ratio
        before = loop.weights()
        loop.step(batch)
        for name, weight in loop.model.named_parameters():
            floor = 0.1 * weight.numel() ** 0.5
            moved = float((weight.detach() - before[name]).norm())
            # the norms of the weights are up to 16 steps old
            assert moved <= 1.05 * ratio * max(float(before[name].norm()), floor) * 1.5
    assert any(row.capped_tensors for row in loop.guard.history)


def test_a_cap_that_does_not_adapt_holds_whatever_the_rate() -> None:
    cap = UpdateCap(max_ratio=0.02, adaptive=False)
    loop = Loop(adam_at(0.09), **{**OFF, "cap": cap}).run(BATCHES)
    assert all(row.capped_tensors for row in loop.guard.history)
    assert {row.max_ratio for row in loop.guard.history} == {0.02}


@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_grow_do_not_make_a_rate_ordinary(fused: bool) -> None:
    """A rate is ordinary again only when it is lower than where it was not."""
    cap = UpdateCap(max_ratio=0.15, start_ratio=0.02, wide_ratio=0.02)
    loop = Loop(adam_at(0.3, fused), **{**OFF, "cap": cap}).run(BATCHES[:4])
    assert loop.guard.history[-1].capped_tensors > 0
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.fill_(10.0 * loop.optimizer.param_groups[0]["lr"])  # a step is 0.1 of that
    loop.run(BATCHES)  # the norms are measured every 16 steps
    assert loop.guard.history[-1].capped_tensors > 0
    saved = loop.guard.state_dict()
    for group in loop.optimizer.param_groups:
        group["lr"] *= 0.5
    before = loop.guard.step
    loop.run(BATCHES[:8])
    assert all(row.capped_tensors == 0 for row in loop.guard.history if row.step > before)
    for group in loop.optimizer.param_groups:
        group["lr"] *= 2.0
    loop.guard.load_state_dict(saved)
    loop.run(BATCHES[:4])
    assert loop.guard.history[-1].capped_tensors > 0
