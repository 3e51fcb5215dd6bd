"""Moving tensors back along an update."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.measure.updates import RMS_FLOOR
from lightning_gradguard.respond.cap_enforcement import UpdateShrinker

DEVICE = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


@DEVICE
@given(size=st.floats(1e-6, 1e6), cap=st.floats(1e-3, 10.0), seed=st.integers(0, 100))
def test_an_update_of_any_size(on_device: bool, size: float, cap: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(5, 7, generator=generator)
    update = torch.randn(5, 7, generator=generator)
    update *= size * before.norm() / update.norm()
    weight = before.clone()
    shrinker = UpdateShrinker([weight], on_device=on_device)
    shrinker.copy([0])
    weight += update
    taken = weight.clone()
    assert shrinker.shrink(cap) == (size > cap) or size == pytest.approx(cap, rel=1e-5)
    if size < cap * (1 - 1e-5):
        assert torch.equal(weight, taken)
    else:
        expected = before + update * min(1.0, cap / size)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


@DEVICE
def test_only_the_copied_tensors_are_moved_back(on_device: bool) -> None:
    tensors = [torch.ones(4) for _ in range(3)]
    shrinker = UpdateShrinker(tensors, on_device=on_device)
    for chosen in ([1], [0, 2], [], [0, 1, 2]):
        for t in tensors:
            t.fill_(1.0)
        shrinker.copy(chosen)
        for t in tensors:
            t.mul_(3.0)
        assert shrinker.shrink(0.5) == len(chosen)
        assert [t[0].item() for t in tensors] == [1.5 if i in chosen else 3.0 for i in range(3)]


@DEVICE
def test_factors_that_are_given_hold_within_the_cap_too(on_device: bool) -> None:
    tensors = [torch.ones(4) for _ in range(2)]
    shrinker = UpdateShrinker(tensors, on_device=on_device)
    shrinker.copy([0, 1])
    for t in tensors:
        t.mul_(1.2)
    assert shrinker.shrink(0.5, [0.5, 1.0]) == 1
    assert [t[0].item() for t in tensors] == pytest.approx([1.1, 1.2])


@DEVICE
@pytest.mark.parametrize("shape", [(4,), (4, 4)], ids=["vector", "matrix"])
def test_a_tensor_at_zero_may_move_by_a_share_of_the_floor(
    on_device: bool, shape: tuple[int, ...]
) -> None:
    weight = torch.zeros(shape)
    shrinker = UpdateShrinker([weight], on_device=on_device)
    shrinker.copy([0])
    weight += 1.0
    assert shrinker.shrink(0.5) == 1
    limit = 0.5 * RMS_FLOOR * math.sqrt(weight.numel())
    assert weight.norm().item() == pytest.approx(limit)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_taken_back(value: float) -> None:
    weight = torch.ones(4)
    shrinker = UpdateShrinker([weight], on_device=False)
    shrinker.copy([0])
    weight[2] = value
    assert shrinker.shrink(0.5) == 1
    assert torch.equal(weight, torch.ones(4))


@DEVICE
def test_tensors_are_copied_again_at_every_step(on_device: bool) -> None:
    weight = torch.ones(4)
    shrinker = UpdateShrinker([weight], on_device=on_device)
    for _ in range(3):
        shrinker.copy([0])
        weight.mul_(2.0)
        assert shrinker.shrink(0.1) == 1
    torch.testing.assert_close(weight, torch.full((4,), 1.1**3))
