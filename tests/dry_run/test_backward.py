"""Gradients that are returned and accumulated nowhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.dry_run import preflight
from lightning_gradguard.dry_run.backward import gradients
from tests.models import assert_same_bits


def expected_gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return grads


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3))
        self.reentrant = reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        output: Any = checkpoint(self.second, self.first(inputs), use_reentrant=self.reentrant)
        return output


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
        Checkpointed(reentrant=False),
        Checkpointed(reentrant=True),
    ],
    ids=["layer", "chain", "checkpoint", "reentrant checkpoint"],
)
def test_they_are_those_of_backward(model: nn.Module) -> None:
    inputs = torch.randn(4, 3)
    expected = expected_gradients(model, model(inputs).square().sum())
    found = gradients(model(inputs).square().sum(), list(model.parameters()))
    assert_same_bits(found, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_parameter_may_be_the_loss_itself_or_play_no_part() -> None:
    scale, spare = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(2))
    one, other = gradients(scale, [scale, spare])
    assert one is not None
    assert one.item() == 1.0
    assert other is None


def test_other_leaves_feel_their_hooks_and_get_no_gradient() -> None:
    weight, inputs = nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)
    arrived: list[Tensor] = []
    inputs.register_hook(arrived.append)
    gradients((weight * inputs).sum(), [weight])
    assert len(arrived) == 1
    assert inputs.grad is None


def stepping(model: nn.Module) -> None:
    """An optimizer that steps within the backward pass."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad))


def test_an_optimizer_within_the_backward_pass_stays_asleep() -> None:
    model = nn.Linear(3, 1)
    stepping(model)
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(model.weight.detach().clone())
        return model(batch).sum()

    batches = torch.utils.data.DataLoader([torch.ones(3)] * 3)  # type: ignore[arg-type]
    preflight(model, batches, loss=loss, verbose=False)
    assert_same_bits(seen[1:], seen[:1] * 2)


def test_together_with_a_reentrant_checkpoint_it_is_refused() -> None:
    model = Checkpointed(reentrant=True)
    stepping(model)
    with pytest.raises(ValueError, match="module must not have both checkpoints with use_reentr"):
        preflight(model, torch.randn(2, 3), loss=lambda m, x: m(x).sum())


def test_a_recurrent_module_in_a_reentrant_checkpoint_is_measured() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn = nn.Linear(3, 3), nn.RNN(3, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            run = lambda x: self.rnn(x)[0]  # noqa: E731
            output: Any = checkpoint(run, self.first(inputs), use_reentrant=True)
            return output

    model = Model()
    result = preflight(
        model, torch.randn(12, 2, 3), loss=lambda m, x: m(x)[-1].sum(), verbose=False
    )
    assert math.isfinite(result.time[0].decay_rate)
    assert all(parameter.grad is None for parameter in model.parameters())
