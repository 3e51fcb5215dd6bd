"""The bound changes the size of an update and nothing else, for every kind of parameter."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gradguard.respond.weight_norms import REFRESH_EVERY
from tests.models import assert_same_bits
from tests.respond.optimizers import (
    ALL,
    NORMALIZING,
    OTHERS,
    SGD,
    Bounded,
    gradient_steps,
    relative_changes,
    weights,
)

CAP = 0.005


def run(name: str, steps: int = 20, *, cap: float, on_device: bool = False, **kind: Any) -> Bounded:
    parameters = weights(**kind)
    bounded = Bounded(ALL[name](parameters), cap, on_device)
    for _ in gradient_steps(parameters, [1.0] * steps):
        bounded.step()
    return bounded


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", ALL)
def test_where_nothing_binds_no_bit_changes(name: str, on_device: bool) -> None:
    bounded = run(name, cap=1e3, on_device=on_device)
    assert sum(bounded.held_back) == 0
    parameters = weights()
    optimizer = ALL[name](parameters)
    for _ in gradient_steps(parameters, [1.0] * 20):
        optimizer.step()
    watched = [p for group in optimizer.param_groups for p in group["params"]]
    assert_same_bits(bounded.parameters, watched)
    assert_same_bits(bounded.optimizer.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", [*NORMALIZING, *OTHERS])
def test_a_shrunk_update_keeps_its_direction(name: str) -> None:
    for scale in (1.0, 1e6):
        parameters = weights()
        bounded = Bounded(ALL[name](parameters), CAP / 10)
        before = [p.detach().clone() for p in bounded.parameters]
        for _ in gradient_steps(parameters, [scale]):
            free = [p.detach().clone().requires_grad_() for p in bounded.parameters]
            for one, other in zip(free, bounded.parameters, strict=True):
                one.grad = other.grad.clone()
            ALL[name](free).step()
            bounded.step()
        assert bounded.held_back[0] > 0
        for old, new, unbound in zip(before, bounded.parameters, free, strict=True):
            change, expected = (new - old).detach().flatten(), (unbound - old).detach().flatten()
            assert torch.cosine_similarity(change, expected, dim=0) > 0.9999


@pytest.mark.parametrize("name", SGD)
def test_sgd_keeps_the_direction_of_the_gradient_in_the_momentum(name: str) -> None:
    """The gradient itself is scaled down, so the momentum never holds the spike."""
    parameters = weights()
    bounded = Bounded(ALL[name](parameters), CAP)
    for _ in gradient_steps(parameters, [1e6]):
        gradients = [p.grad.clone() for p in parameters]
        bounded.step()
    for gradient, p in zip(gradients, parameters, strict=True):
        assert torch.cosine_similarity(p.grad.flatten(), gradient.flatten(), dim=0) > 0.9999
        buffer = bounded.optimizer.state[p].get("momentum_buffer")
        assert buffer is None or buffer.norm() < 10.0


@pytest.mark.parametrize("name", [*NORMALIZING, *OTHERS])
def test_host_and_device_agree(name: str) -> None:
    host, device = (run(name, cap=CAP, on_device=on_device) for on_device in (False, True))
    assert sum(host.held_back) > 0
    torch.testing.assert_close(host.parameters, device.parameters)
    assert sum(host.held_back) == sum(device.held_back)


@pytest.mark.parametrize("name", SGD)
def test_host_and_device_agree_on_sgd(name: str) -> None:
    host, device = (run(name, cap=1e-3, on_device=on_device) for on_device in (False, True))
    assert sum(host.held_back) > 0
    torch.testing.assert_close(host.parameters, device.parameters)
    assert host.held_back == device.held_back


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "lion", "rprop"])
def test_each_group_has_its_own_learning_rate(name: str) -> None:
    """A group whose rate is tiny is left alone beside one that is held back at every step."""
    first, second = weights(), weights()
    groups = [{"params": first}, {"params": second, "lr": 1e-9}]
    bounded = Bounded(ALL[name](groups), CAP)
    alone = Bounded(ALL[name](weights()), CAP)
    for _ in zip(
        gradient_steps(first, [1.0] * 20),
        gradient_steps(second, [1.0] * 20),
        gradient_steps(alone.parameters, [1.0] * 20),
        strict=True,
    ):
        changes = bounded.step()
        alone.step()
        # Rprop's steps start at its rate and grow
        assert max(changes[3:]) < 1e-4
    assert_same_bits(first, alone.parameters)
    assert sum(bounded.held_back) == sum(alone.held_back) > 0


def test_a_group_without_parameters() -> None:
    for name in ("sgd", "adamw", "lion"):
        parameters = weights()
        bounded = Bounded(ALL[name]([{"params": parameters}, {"params": []}]), CAP)
        for _ in gradient_steps(parameters, [1e6] * 3):
            assert max(bounded.step()) <= CAP * 1.1


def test_parameters_without_gradient_do_not_move() -> None:
    for name in ALL:
        bounded = Bounded(ALL[name](weights()), CAP)
        for _ in gradient_steps(bounded.parameters, [1.0] * 3):
            bounded.parameters[0].grad = None
            assert bounded.step()[0] == 0.0, name


# bfloat16 keeps 8 bits: the weights themselves are rounded by up to 0.4 % of each element.
KINDS = [
    pytest.param(torch.float64, 1e-3, id="float64"),
    pytest.param(torch.bfloat16, 1.0, id="bfloat16"),
    pytest.param(torch.complex64, 1e-3, id="complex64"),
    pytest.param(torch.complex128, 1e-3, id="complex128"),
]


@pytest.mark.parametrize(("dtype", "slack"), KINDS)
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "adamw fused", "lion"])
def test_every_dtype(name: str, on_device: bool, dtype: torch.dtype, slack: float) -> None:
    if dtype.is_complex and name in ("adamw fused", "lion"):
        pytest.skip("the optimizer itself takes no complex parameters")
    parameters = weights(dtype)
    bounded = Bounded(ALL[name](parameters), CAP, on_device)
    for _ in gradient_steps(parameters, [30.0] * 20):
        changes = bounded.step()
        assert max(changes) <= CAP * (1.2 + slack)
    assert sum(bounded.held_back) > 0


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "lion"])
def test_parameters_of_several_dtypes(name: str) -> None:
    parameters = [*weights(), *weights(torch.float64), *weights(torch.bfloat16)]
    bounded = Bounded(ALL[name](parameters), CAP)
    for _ in gradient_steps(parameters, [30.0] * 20):
        assert max(bounded.step()[:6]) <= CAP * 1.2
    assert sum(bounded.held_back) > 0


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "adamw fused", "lion", "rprop"])
def test_channels_last_is_the_same_weight(name: str) -> None:
    plain = nn.Parameter(torch.randn(4, 3, 3, 3))
    permuted = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    runs = [Bounded(ALL[name]([p]), CAP) for p in (plain, permuted)]
    for step, _ in enumerate(gradient_steps([plain], [1.0] * 20)):
        permuted.grad = plain.grad.clone(memory_format=torch.channels_last)
        (one,), (other,) = (bounded.step() for bounded in runs)
        assert other == pytest.approx(one, rel=1e-3), step
        assert other <= CAP * 1.2
    assert permuted.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(permuted.contiguous(), plain)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "lion"])
def test_parameters_that_get_new_storage(name: str) -> None:
    """Known again after REFRESH_EVERY steps at the latest; the storage is not asked every step."""
    parameters = weights()
    bounded = Bounded(ALL[name](parameters), CAP)
    for step, _ in enumerate(gradient_steps(parameters, [1.0] * (3 * REFRESH_EVERY))):
        if step == REFRESH_EVERY + 3:
            for p in parameters:
                p.data = p.data.clone() * 0.5
        changes = bounded.step()
        if not REFRESH_EVERY + 3 <= step < 2 * REFRESH_EVERY + 3:
            assert max(changes) <= CAP * 1.2, step
    assert sum(bounded.held_back[-REFRESH_EVERY:]) > 0


# What these forget, they find out again by copying everything once: the weights are the same.
@pytest.mark.parametrize("at", [1, 7, 23])
@pytest.mark.parametrize("name", ALL)
def test_resume_continues_bit_for_bit(name: str, at: int) -> None:
    factors = [1.0] * 16 + [1e4] + [1.0] * 15
    whole = Bounded(ALL[name](weights()), CAP)
    for _ in gradient_steps(whole.parameters, factors):
        whole.step()
    first = Bounded(ALL[name](weights()), CAP)
    grads = gradient_steps(first.parameters, factors)
    for _ in range(at):
        next(grads)
        first.step()
    file = io.BytesIO()
    torch.save({"bound": first.bound.state_dict(), "rest": first.optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed_weights = copy.deepcopy(first.parameters)
    resumed = Bounded(ALL[name](resumed_weights), CAP)
    resumed.optimizer.load_state_dict(state["rest"])
    resumed.bound.load_state_dict(state["bound"])
    held_back = list(first.held_back)
    for _ in grads:
        for one, other in zip(resumed.parameters, first.parameters, strict=True):
            one.grad = other.grad.clone()
        before = [p.detach().clone() for p in resumed.parameters]
        resumed.step()
        assert max(relative_changes(before, resumed.parameters)) < 1.0
    assert_same_bits(resumed.parameters, whole.parameters)
    assert held_back + resumed.held_back == whole.held_back
