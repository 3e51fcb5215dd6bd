"""A preflight leaves everything as it was found, whatever the training step does."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.dry_run import preflight
from tests.distributed import run_on_ranks
from tests.dry_run.models import CharacterModel, state_of, text_batches
from tests.models import assert_same_bits, loader


def seeded() -> CharacterModel:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return CharacterModel()


def test_model_metrics_random_numbers_and_gradients_are_as_found() -> None:
    model = seeded()
    for _ in range(2):  # so that there is something to keep
        model.loss(text_batches(1)[0]).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    before = state_of(model)
    batch = text_batches(1)[0]
    letters = batch.clone()

    preflight(model, batch, verbose=False)

    assert_same_bits(state_of(model), before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert_same_bits(batch, letters)


def test_the_comparison_above_sees_what_a_training_step_leaves() -> None:
    model = seeded()
    before = state_of(model)
    model.log = model.log_dict = lambda *arguments, **settings: None  # type: ignore[method-assign]
    model.training_step(text_batches(1)[0], 0)
    after = state_of(model)
    differing = {key for key in before if not _same(before[key], after[key])}
    assert differing == {"weights", "attributes", "torch", "python", "numpy"}


def _same(one: Any, other: Any) -> bool:
    try:
        assert_same_bits(one, other)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["step", "backward", "second batch"])
def test_after_an_exception_as_well(error: type[BaseException], place: str) -> None:
    class Failing(CharacterModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if place == "step" or (place == "second batch" and batch_idx == 1):
                raise error
            if place == "backward":
                loss.register_hook(fail)
            return loss

    def fail(grad: Tensor) -> None:
        raise error

    torch.manual_seed(3)
    model = Failing()
    model.loss(text_batches(1)[0]).backward()
    model.eval()
    before = state_of(model)
    with pytest.raises(error):
        preflight(model, loader(text_batches(2)), verbose=False)
    assert_same_bits(state_of(model), before)


def test_a_batch_that_the_step_takes_apart_comes_back_whole() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        targets = batch.pop("targets")
        return (model(batch["inputs"].mul_(2.0)) - targets).square().mean()

    batch = {"targets": torch.ones(3, 1), "inputs": torch.ones(3, 2)}
    preflight(nn.Linear(2, 1), batch, loss=loss, verbose=False)
    assert list(batch) == ["targets", "inputs"]
    assert batch["inputs"].tolist() == [[1.0, 1.0]] * 3


def test_weights_that_the_step_itself_changes_come_back() -> None:
    class Teacher(CharacterModel):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(3, 3).requires_grad_(False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.teacher.weight.lerp_(torch.ones(3, 3), 0.1)
                self.head.weight.clamp_(-0.1, 0.1)
            return super().training_step(batch, batch_idx)

    model = Teacher()
    before = state_of(model)
    preflight(model, text_batches(1)[0], verbose=False)
    assert_same_bits(state_of(model), before)


def test_autocast_forgets_weights_that_only_the_step_has_had() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            model.weight.mul_(2.0)
        return model(batch).sum()

    model, batch = nn.Linear(2, 1), torch.ones(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(batch)
        torch.clear_autocast_cache()
        preflight(model, batch, loss=loss, verbose=False)
        assert_same_bits(model(batch), expected)


def _step_before_and_after() -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(2, 1))
    rank = dist.get_rank()
    batch = torch.full((4, 2), 1.0 + rank)

    def step() -> list[float]:
        model.zero_grad()
        model(batch).sum().backward()
        return model.module.weight.grad.flatten().tolist()

    before = step()
    if rank == 0:  # needs nobody else
        for one in (model, model.module):
            preflight(one, batch, loss=lambda m, x: m(x).sum(), verbose=False)
        preflight(model, batch, loss=_reentrant, verbose=False)  # sets off the reducer's hooks
    return before, step()


def _reentrant(model: nn.Module, batch: Tensor) -> Tensor:
    output: Any = checkpoint(model, batch.clone().requires_grad_(), use_reentrant=True)
    return output.sum()


def _refusal_of_a_sharded_parameter() -> str:
    model = nn.Linear(2, 4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    try:
        preflight(model, torch.ones(3, 2), loss=lambda m, x: m(x).sum(), verbose=False)
    except ValueError as refusal:
        return str(refusal)
    return "none"


def _on_a_rank() -> tuple[tuple[list[float], list[float]], str]:
    return _step_before_and_after(), _refusal_of_a_sharded_parameter()


@pytest.mark.slow
def test_ddp_reduces_its_next_gradients_as_before_and_shards_are_refused() -> None:
    for (before, after), refusal in run_on_ranks(_on_a_rank):
        assert after == before == [6.0, 6.0]
        assert refusal.endswith("got 'weight', which is spread over processes")
