"""Copies that are put back bit for bit, in place, whatever the optimizer keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.respond.copies import TensorCopy, all_finite, copy_of, put_back
from lightning_gradguard.respond.rollback import WeightRollback
from lightning_gradguard.respond.snapshots import WeightSnapshots
from lightning_gradguard.respond.weight_keeper import WeightKeeper
from tests.distributed import run_on_ranks
from tests.models import assert_same_bits
from tests.respond.optimizers import ALL, gradient_steps, weights

O = torch.optim  # noqa: E741
MORE: dict[str, Callable[..., Optimizer]] = {
    "adamw amsgrad": lambda p: O.AdamW(p, lr=1e-3, amsgrad=True),
    "adamw fused amsgrad": lambda p: O.AdamW(p, lr=1e-3, amsgrad=True, fused=True),
    "rmsprop loop": lambda p: O.RMSprop(p, lr=1e-3, centered=True, momentum=0.9, foreach=False),
    "rmsprop foreach": lambda p: O.RMSprop(p, lr=1e-3, centered=True, momentum=0.9, foreach=True),
    "nadam foreach": lambda p: O.NAdam(p, lr=1e-3, foreach=True),
    "radam foreach": lambda p: O.RAdam(p, lr=1e-3, foreach=True),
    "adagrad foreach": lambda p: O.Adagrad(p, lr=1e-2, foreach=True),
    "adagrad fused": lambda p: O.Adagrad(p, lr=1e-2, fused=True),
}


class Preconditioned(Optimizer):
    """Keeps what Shampoo and its like keep: numbers, lists, nests, and tensors that it replaces."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state |= {
                    "step": 0,
                    "kind": "matrix" if p.dim() > 1 else "vector",
                    "factors": [torch.zeros(n, n) for n in p.shape],
                    "average": {"first": torch.zeros_like(p), "sizes": ([], 0.5)},
                }
            state["step"] += 1
            state["average"]["first"].lerp_(p.grad, 0.1)
            state["average"]["sizes"][0].append(p.grad.norm().item())
            state["factors"] = [f + state["step"] for f in state["factors"]]
            if state["step"] == 3:
                state["late"] = torch.ones(2)
            scale = sum(f.sum().item() for f in state["factors"])
            p.sub_(state["average"]["first"], alpha=self.param_groups[0]["lr"] / scale)


EVERY: dict[str, Callable[..., Optimizer]] = {
    **ALL,
    **MORE,
    "preconditioned": Preconditioned,
}


class Subject:
    """Parameters, an optimizer and its copies."""

    def __init__(self, make: Callable[..., Optimizer], dtype: torch.dtype = torch.float32) -> None:
        self.model = nn.Module()
        for number, weight in enumerate(weights(dtype)):
            self.model.register_parameter(f"weight{number}", weight)
        self.optimizer = make(list(self.model.parameters()))
        self.snapshots = WeightSnapshots(self.model, self.optimizer)

    def steps(self, count: int, seed: int = 0) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for _ in gradient_steps(parameters, [1.0] * count, seed):
            self.optimizer.step()

    def state(self) -> Any:
        """Everything there is, as a copy."""
        return copy.deepcopy([list(self.model.parameters()), self.optimizer.state_dict()["state"]])


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("name", EVERY)
def test_everything_is_put_back_to_the_bit(name: str, at: int) -> None:
    subject = Subject(EVERY[name])
    subject.steps(at)
    before = subject.state()
    subject.snapshots.take(at)
    subject.steps(5, seed=1)
    after = subject.state()
    assert subject.snapshots.restore() == at
    assert_same_bits(subject.state(), before, "restored")
    # And it goes on from there as it did, twice: nothing is shared with the copy.
    for _ in range(2):
        subject.steps(5, seed=1)
        assert_same_bits(subject.state(), after, "went on")
        subject.snapshots.restore()
        assert_same_bits(subject.state(), before, "restored again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("name", ["adamw loop", "sgd momentum", "adagrad"])
def test_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    subject = Subject(EVERY[name], dtype)
    subject.steps(2)
    before = subject.state()
    subject.snapshots.take(2)
    subject.steps(2, seed=1)
    subject.snapshots.restore()
    assert_same_bits(subject.state(), before)


@pytest.mark.parametrize("name", ["adamw", "adamw fused", "sgd momentum", "rmsprop centered"])
def test_tensors_keep_their_identity(name: str) -> None:
    subject = Subject(EVERY[name])
    subject.steps(2)
    subject.snapshots.take(2)

    def tensors() -> list[Tensor]:
        state = [s for p in subject.model.parameters() for s in subject.optimizer.state[p].values()]
        return [*subject.model.parameters(), *(s for s in state if isinstance(s, Tensor))]

    held = tensors()
    pointers = [t.data_ptr() for t in held]
    subject.steps(2, seed=1)
    subject.snapshots.restore()
    assert all(one is other for one, other in zip(tensors(), held, strict=True))
    assert [t.data_ptr() for t in tensors()] == pointers


def test_what_a_step_did_not_have_is_removed_and_what_is_gone_comes_back() -> None:
    subject = Subject(Preconditioned)
    first = next(iter(subject.model.parameters()))
    subject.snapshots.take(0)
    subject.steps(3)
    subject.snapshots.take(3)
    del subject.optimizer.state[first]["factors"]
    subject.snapshots.restore()
    assert not subject.optimizer.state
    subject.steps(3)
    subject.snapshots.take(3)
    subject.snapshots.take(4)
    expected = subject.state()
    subject.optimizer.state.clear()
    subject.snapshots.restore()
    assert_same_bits(subject.state(), expected)


def test_gradients_and_settings_are_left_alone() -> None:
    subject = Subject(EVERY["adamw"])
    subject.snapshots.take(0)
    subject.steps(1)
    subject.optimizer.param_groups[0]["lr"] = 0.5
    gradients = [p.grad for p in subject.model.parameters()]
    values = copy.deepcopy(gradients)
    subject.snapshots.restore()
    assert subject.optimizer.param_groups[0]["lr"] == 0.5
    now = [p.grad for p in subject.model.parameters()]
    assert all(one is other for one, other in zip(now, gradients, strict=True))
    assert_same_bits(now, values)


def test_parameters_that_were_added_since_are_left_alone() -> None:
    subject = Subject(EVERY["adamw"])
    subject.snapshots.take(0)
    extra = nn.Parameter(torch.ones(3))
    subject.optimizer.add_param_group({"params": [extra]})
    subject.steps(1)
    moved = extra.detach().clone()
    subject.snapshots.restore()
    assert torch.equal(extra, moved)
    assert set(subject.optimizer.state) == {extra}
    subject.snapshots.take(1)
    subject.snapshots.take(2)
    subject.steps(1)
    subject.snapshots.restore()
    assert torch.equal(extra, moved)


# -- two copies ------------------------------------------------------------------------------------


def test_the_older_of_two_copies_is_put_back() -> None:
    subject = Subject(EVERY["adamw"])
    assert (subject.snapshots.step, subject.snapshots.newest) == (None, None)
    states = []
    for number in range(4):
        states.append(subject.state())
        subject.snapshots.take(10 * number)
        assert subject.snapshots.newest == 10 * number
        assert subject.snapshots.step == max(0, 10 * (number - 1))
        subject.steps(1, seed=number)
    assert subject.snapshots.restore() == 20
    assert_same_bits(subject.state(), states[2])
    assert (subject.snapshots.step, subject.snapshots.newest) == (20, 20)
    subject.steps(1)
    subject.snapshots.take(50)
    subject.steps(1)
    assert subject.snapshots.restore() == 20
    assert_same_bits(subject.state(), states[2])


def test_without_a_copy_there_is_nothing_to_put_back() -> None:
    with pytest.raises(RuntimeError, match="no copy"):
        Subject(EVERY["sgd"]).snapshots.restore()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_copy_that_is_not_finite_is_never_the_one_to_go_back_to(bad: float) -> None:
    subject = Subject(EVERY["adamw"])
    subject.snapshots.take(0)
    subject.steps(1)
    subject.snapshots.take(1)
    kept = subject.state()
    assert subject.snapshots.newest_is_finite()
    next(iter(subject.model.parameters())).data[0, 0] = bad
    subject.snapshots.take(2)
    assert not subject.snapshots.newest_is_finite()
    subject.snapshots.take(3)
    assert subject.snapshots.restore() == 1
    assert_same_bits(subject.state(), kept)


def test_memory_is_used_again() -> None:
    subject = Subject(EVERY["adamw"])
    subject.steps(1)
    seen: list[set[int]] = []
    for step in range(6):
        subject.snapshots.take(step)
        candidate = subject.snapshots._candidate
        assert candidate is not None
        copies = [*candidate.weights.values()]
        copies += [c for s in candidate.states.values() for c in s.values()]  # type: ignore[attr-defined]
        seen.append({c.host.data_ptr() for c in copies})
        if step == 3:
            subject.snapshots.restore()
    assert len(set().union(*seen)) <= 3 * len(seen[0])
    assert seen[4] in seen[:4]
    assert seen[5] in seen[:4]


# -- buffers ---------------------------------------------------------------------------------------


class Normalized(nn.Module):
    """A frozen branch with running statistics, a buffer that is replaced and one that repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("repeated", torch.arange(3.0)[:1].expand(5))
        self.alias = self.norm

    def forward(self, inputs: Tensor) -> Tensor:
        self.cache = torch.cat([self.cache, inputs[:1, 0].detach()])
        return self.norm(self.frozen(inputs)).square().mean() + self.repeated.sum()


def test_buffers_are_put_back_too() -> None:
    model = Normalized()
    optimizer = O.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    snapshots = WeightSnapshots(model, optimizer)
    held = dict(model.named_buffers())
    before = {name: b.clone() for name, b in held.items()}
    snapshots.take(0)
    for _ in range(3):
        model(torch.randn(8, 4)).backward()
        optimizer.step()
    model.norm.running_mean.fill_(math.nan)
    assert model.norm.num_batches_tracked == 3
    snapshots.restore()
    assert_same_bits(dict(model.named_buffers()), before)
    assert model.norm.running_mean is held["norm.running_mean"]
    assert model.frozen[1].running_var is held["frozen.1.running_var"]
    assert model.nothing is None


# -- values of every kind --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 4).t(),
        lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        lambda: torch.randn(6, 6)[::2, 1:3],
        lambda: torch.zeros(0, 3),
        lambda: torch.tensor(3),
        lambda: torch.randn(3).to_sparse(),
        lambda: torch.tensor([True, False]),
    ],
)
def test_tensors_of_every_form(make: Callable[[], Tensor]) -> None:
    tensor = make()
    expected = tensor.clone()
    kept = TensorCopy(tensor)
    tensor.zero_()
    assert_same_bits(kept.put_back(tensor).to_dense(), expected.to_dense())
    assert_same_bits(kept.put_back(None).to_dense(), expected.to_dense())
    assert kept.put_back(None).dtype == expected.dtype


def test_other_objects_are_copied_as_a_whole() -> None:
    value = {"of": bytearray(b"abc"), 1: None}
    kept = copy_of(value)
    value["of"].extend(b"d")
    first = put_back(kept, value)
    assert first == {"of": bytearray(b"abc"), 1: None}
    first["of"].extend(b"e")
    assert put_back(kept, None) == {"of": bytearray(b"abc"), 1: None}


def test_weights_whose_squares_overflow_are_finite() -> None:
    assert all_finite([torch.full((4,), 1e30), torch.full((2,), 3e4, dtype=torch.half)])
    assert all_finite([torch.full((4,), 1e300, dtype=torch.float64), torch.zeros(0)])
    assert all_finite([torch.arange(3)]) is None
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite([torch.zeros(3), torch.tensor([0.0, bad])])
        assert not all_finite([torch.tensor([complex(0.0, bad)])])


# -- bounds ----------------------------------------------------------------------------------------


def keeper_of(subject: Subject, *, silent: bool = False, alone: bool = True, **how: Any) -> Any:
    settings = WeightRollback(**how)
    return WeightKeeper(subject.model, subject.optimizer, settings, alone=alone, silent=silent)


def test_a_model_that_is_too_large_goes_without_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    subject = Subject(EVERY["adamw"])
    size = 4 * sum(p.numel() for p in subject.model.parameters())
    keeper = keeper_of(subject, max_bytes=2 * size)
    keeper.take(0)
    assert keeper.step == 0
    subject.steps(1)  # and with it the optimizer's state
    for step in (1, 2):
        keeper.take(step)
        assert not keeper.active
        assert keeper.step is None
        assert not keeper.finds_damage(step, look=True)
    (record,) = caplog.records
    assert "max_bytes" in record.getMessage()


def test_what_cannot_be_copied_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    subject = Subject(EVERY["sgd"])
    first = next(iter(subject.model.parameters()))
    subject.optimizer.state[first]["lock"] = (n for n in range(3))
    keeper = keeper_of(subject)
    keeper.take(0)
    assert not keeper.active
    (record,) = caplog.records
    assert "cannot be copied" in record.getMessage()
    # Ranks have to go on alike: with others, that is an error for all of them.
    with pytest.raises(TypeError):
        keeper_of(subject, alone=False).take(0)


def test_damage_is_found_in_the_copy_and_on_demand() -> None:
    subject = Subject(EVERY["sgd"])
    keeper = keeper_of(subject)
    keeper.take(0)
    assert not keeper.finds_damage(0, look=True)
    weight = next(iter(subject.model.parameters())).data
    weight[0, 0] = math.nan
    assert not keeper.finds_damage(1, look=False)
    assert keeper.finds_damage(1, look=True)
    keeper.take(10)
    assert not keeper.finds_damage(9, look=False)  # on its way
    assert keeper.finds_damage(10, look=False)
    assert not keeper.finds_damage(11, look=False)  # said once
    keeper.restore()
    assert not keeper.finds_damage(12, look=True)
    assert weight.isfinite().all()


def test_weights_that_were_never_finite_are_not_judged() -> None:
    subject = Subject(EVERY["sgd"])
    next(iter(subject.model.parameters())).data[0, 0] = -math.inf
    keeper = keeper_of(subject)
    keeper.take(0)
    assert not keeper.finds_damage(0, look=True)
    assert not keeper.finds_damage(1, look=True)


# -- sharded ---------------------------------------------------------------------------------------


def restore_shards() -> tuple[list[bool], int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = O.AdamW(model.parameters(), lr=0.1)
    snapshots = WeightSnapshots(model, optimizer)

    def step() -> None:
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def everything() -> list[Tensor]:
        state = [t for p in model.parameters() for t in optimizer.state.get(p, {}).values()]
        return [local_tensor(t).detach().clone() for t in (*model.parameters(), *state)]

    same = []
    snapshots.take(0)
    at_first = everything()
    step()
    snapshots.restore()
    same.append(all(map(torch.equal, everything(), at_first)) and not optimizer.state)
    step()
    snapshots.take(1)
    snapshots.take(2)
    kept = everything()
    held = next(iter(optimizer.state.values()))["exp_avg"]
    step()
    snapshots.restore()
    same.append(all(map(torch.equal, everything(), kept)))
    same.append(next(iter(optimizer.state.values()))["exp_avg"] is held)
    optimizer.state.clear()
    snapshots.restore()  # the shards of the state are made anew
    same.append(all(map(torch.equal, everything(), kept)))
    step()
    same.append(snapshots.bytes_of_two > 0)
    same.append(all(t.isfinite().all() for t in everything()))
    return same, snapshots.bytes_of_two


@pytest.mark.slow
def test_shards_are_put_back() -> None:
    (first, size), (second, size_of_second) = run_on_ranks(restore_shards, 2)
    assert all(first)
    assert all(second)
    assert size == size_of_second, "ranks would leave it out at different sizes"


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_on_a_gpu_the_copy_is_made_beside_the_training(capturable: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).cuda()
    optimizer = O.AdamW(model.parameters(), lr=0.1, capturable=capturable)
    snapshots = WeightSnapshots(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 64, device="cuda")).square().mean().backward()
        optimizer.step()

    step()
    for number in range(3):  # memory has to be there
        snapshots.take(number)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    torch.cuda.set_sync_debug_mode("error")
    try:
        snapshots.take(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    snapshots.take(4)
    for _ in range(5):
        step()
    assert snapshots._confirmed.weights[next(model.parameters())].host.is_pinned()
    snapshots.restore()
    assert_same_bits([model.state_dict(), optimizer.state_dict()["state"]], before)


def flip_exponent(weight: Tensor) -> None:
    """The highest bit of the exponent of one element below 1, as faulty memory flips it."""
    with torch.no_grad():
        weight.view(-1)[0] = 0.3
        weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 30)


def test_a_flipped_bit_is_out_of_all_proportion_and_training_is_not() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.3)
    snapshots = WeightSnapshots(layer, optimizer)
    assert not snapshots.far_from_copy()  # there is none
    snapshots.take(0)
    for _ in range(100):  # 100 steps of 0.3, also of a bias that was zero
        optimizer.zero_grad()
        (layer(torch.ones(2, 4)) - 100.0).square().sum().backward()
        optimizer.step()
    assert not snapshots.far_from_copy()
    flip_exponent(layer.weight)
    assert bool(layer.weight.isfinite().all())
    assert snapshots.far_from_copy()
    snapshots.restore()
    assert not snapshots.far_from_copy()


def test_the_keeper_takes_a_flipped_bit_for_damage_when_it_looks() -> None:
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    keeper = WeightKeeper(layer, optimizer, WeightRollback(), alone=True, silent=True)
    keeper.take(0)
    assert not keeper.finds_damage(0, look=True)
    flip_exponent(layer.weight)
    assert not keeper.finds_damage(1, look=False)
    assert keeper.finds_damage(1, look=True)


class Game(nn.Module):
    """Two nets with buffers of their own, and one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1))
        self.two = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.register_buffer("turns", torch.zeros(()))

    def play(self) -> None:
        self.one(torch.randn(8, 3))
        self.two(torch.randn(8, 3))
        self.turns += 1


def test_buffers_of_nets_that_others_train_stay() -> None:
    game = Game()
    optimizer = torch.optim.SGD(game.one.parameters(), lr=0.1)
    snapshots = WeightSnapshots(game, optimizer, list(game.two.parameters()))
    game.play()
    snapshots.take(0)
    before = {name: buffer.clone() for name, buffer in game.named_buffers()}
    game.play()
    after = {name: buffer.clone() for name, buffer in game.named_buffers()}
    snapshots.restore()
    now = dict(game.named_buffers())
    for name, buffer in now.items():
        assert torch.equal(buffer, (after if name.startswith("two") else before)[name]), name
    assert now["turns"] == 1
