"""What changes inside the block is as it was after it, and what stays is the same object."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, UserDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradguard.dry_run.untouched import untouched
from tests.models import assert_same_bits

FLOATS = st.floats(width=32)  # infinities, NaN and -0.0 among them


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().view(torch.int32).tolist()


@given(before=st.lists(FLOATS, min_size=1), after=FLOATS)
def test_values_of_a_tensor_come_back_bit_for_bit(before: list[float], after: float) -> None:
    parameter = nn.Parameter(torch.tensor(before))
    expected = bits(parameter)
    with untouched([parameter]):
        parameter.data.fill_(after)
    assert bits(parameter) == expected


def test_memory_shape_and_dtype_of_a_tensor_come_back() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    place, strides = weight.data_ptr(), weight.stride()
    with untouched([weight]):
        weight.data = torch.zeros(5, dtype=torch.float64)
    assert (weight.data_ptr(), weight.stride(), weight.dtype) == (place, strides, torch.float32)
    assert weight.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_the_same_gradient_comes_back_and_is_not_seen_inside() -> None:
    layer = nn.Linear(3, 1)
    layer(torch.ones(2, 3)).sum().backward()
    grad, values = layer.weight.grad, layer.weight.grad.clone()
    with untouched(layer):
        assert layer.weight.grad is None
        layer(torch.ones(2, 3)).square().sum().backward()
        layer.zero_grad(set_to_none=False)
    assert layer.weight.grad is grad
    assert_same_bits(grad, values)


def test_no_gradient_is_left_where_there_was_none() -> None:
    layer = nn.Linear(3, 1)
    with untouched(layer):
        layer(torch.ones(2, 3)).sum().backward()
    assert layer.weight.grad is None


def test_requires_grad_and_being_a_leaf_come_back() -> None:
    layer = nn.BatchNorm1d(2)
    with untouched(layer):
        layer.weight.requires_grad_(False)
        layer.running_mean.mul_(layer.bias)
        assert layer.running_mean.grad_fn is not None
    assert layer.weight.requires_grad
    assert layer.running_mean.is_leaf
    assert not layer.running_mean.requires_grad


def test_a_graph_that_waits_for_its_backward_stays_valid() -> None:
    layer = nn.Linear(3, 3)
    loss = layer(layer(torch.ones(2, 3))).sum()
    with untouched(layer):
        layer(torch.ones(1, 3))
    loss.backward()
    assert layer.weight.grad is not None


def test_an_expanded_tensor_stays_what_it_is() -> None:
    holder = nn.Module()
    holder.mask = torch.ones(1).expand(4)
    with untouched(holder):
        holder.mask = torch.zeros(4)
    assert holder.mask.stride() == (0,)
    assert holder.mask.tolist() == [1.0] * 4


def test_a_tensor_of_inference_mode_comes_back() -> None:
    with torch.inference_mode():
        constant = torch.ones(2)
    with untouched([constant]), torch.inference_mode():
        constant.zero_()
    assert constant.tolist() == [1.0, 1.0]


def test_modules_keep_their_parts_and_their_order() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=nn.Linear(2, 2)))
    names, weight = list(model.state_dict()), model.first.weight
    with untouched(model):
        model.first.weight = nn.Parameter(torch.zeros(2, 2))
        del model.first
        model.first = nn.ReLU()
        model.third = nn.Linear(1, 1)
        model.second.register_forward_hook(lambda *call: None)
        model.second.register_buffer("late", torch.zeros(1))
        model.eval()
    assert list(model.state_dict()) == names
    assert model.first.weight is weight
    assert not model.second._forward_hooks
    assert all(module.training for module in model.modules())


def test_power_iteration_of_spectral_norm_comes_back() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    with untouched(layer):
        layer(torch.ones(1, 4))
        assert not torch.equal(layer.parametrizations.weight[0]._u, state[_U])
    assert_same_bits(dict(layer.state_dict()), state)


_U = "parametrizations.weight.0._u"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
def test_a_scripted_module_keeps_its_mode_and_buffers() -> None:
    layer = torch.jit.script(nn.BatchNorm1d(2)).eval()
    with untouched(layer):
        layer.train()
        layer(torch.randn(4, 2))
    assert not layer.training
    assert layer.running_mean.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1, [2]], lambda v: v[1].append(3)),
        ({"a": {"b": 1}}, lambda v: v["a"].clear()),
        (OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
        (Counter("aab"), lambda v: v.update("abc")),
        ({1, 2}, lambda v: v.discard(1)),
        (deque([1, 2], maxlen=2), lambda v: v.append(3)),
        (([1],), lambda v: v[0].pop()),
        ({"x": torch.ones(2)}, lambda v: v["x"].zero_()),
        ({"x": torch.ones(2)}, lambda v: v.pop("x")),
        ([nn.Linear(1, 1)], lambda v: v[0].eval()),
        (np.arange(3), lambda v: v.fill(7)),
        (UserDict(a=[1]), lambda v: v["a"].append(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers_are_as_they_were(value: Any, change: Any) -> None:
    before = repr(value), getattr(value[0], "training", None) if isinstance(value, list) else None
    with untouched(value):
        change(value)
    after = repr(value), getattr(value[0], "training", None) if isinstance(value, list) else None
    assert after == before


def test_a_container_that_holds_itself_comes_to_an_end() -> None:
    value: list[Any] = [1]
    value.append(value)
    with untouched(value):
        value.append(2)
    assert len(value) == 2


def draw_everywhere() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def test_global_random_numbers_go_on_as_if_none_were_drawn() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = draw_everywhere()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    with untouched():
        draw_everywhere()
    assert draw_everywhere() == expected


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand((), generator=g).item()),
        (lambda: random.Random(1), lambda g: g.random()),
        (lambda: np.random.default_rng(1), lambda g: g.random()),
        (lambda: np.random.RandomState(1), lambda g: g.rand()),
    ],
    ids=["torch", "python", "numpy", "old numpy"],
)
def test_generators_go_on_as_if_nothing_was_drawn(make: Any, draw: Any) -> None:
    generator = make()
    with untouched({"generator": generator}):
        draw(generator)
    assert draw(generator) == draw(make())


@pytest.mark.gpu
def test_random_numbers_of_every_gpu_go_on_as_if_none_were_drawn() -> None:
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    torch.rand(1, device=devices[0])
    states = torch.cuda.get_rng_state_all()
    with untouched():
        for device in devices:
            torch.rand(5, device=device)
    assert_same_bits(torch.cuda.get_rng_state_all(), states)


@pytest.mark.gpu
def test_frozen_tensors_on_a_gpu_come_back_from_their_copy_on_the_host() -> None:
    layer = nn.Linear(3, 3, device="cuda").requires_grad_(False)
    weight = layer.weight.clone()
    with untouched(layer):
        layer.weight.zero_()
    assert_same_bits(layer.weight, weight)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_exception_as_well(error: type[BaseException]) -> None:
    layer = nn.BatchNorm1d(2)
    expected = draw_everywhere()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with pytest.raises(error), untouched(layer):  # noqa: PT012 - raised after the changes
        draw_everywhere()
        layer(torch.randn(4, 2))
        layer.eval()
        raise error
    assert layer.running_mean.tolist() == [0.0, 0.0]
    assert layer.training
    assert draw_everywhere() == expected
