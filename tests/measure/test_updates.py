"""How far tensors moved: exact for small ones, close for large ones, never silently wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_gradguard.measure.updates import RMS_FLOOR, UpdateForecast, UpdateSampler
from tests.measure.dispatch import OperationLog


def true_ratio(before: Tensor, after: Tensor) -> float:
    wide = torch.complex128 if before.is_complex() else torch.float64
    floor = RMS_FLOOR * math.sqrt(before.numel() * (2 if before.is_complex() else 1))
    change = (after.to(wide) - before.to(wide)).norm().item()
    return change / max(before.to(wide).norm().item(), floor)


def measured(tensors: list[Tensor], moved: list[Tensor], samples: int = 64) -> list[float]:
    sampler = UpdateSampler(tensors, samples)
    assert sampler.ratios() is None
    for tensor, target in zip(tensors, moved, strict=True):
        tensor.copy_(target)
    ratios = sampler.ratios()
    assert ratios is not None
    return ratios.tolist()


KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


@given(
    numel=st.integers(1, 64),
    size=st.floats(1e-3, 10.0),
    dtype=st.sampled_from(KINDS),
    seed=st.integers(0, 100),
)
def test_exact_for_small_tensors(numel: int, size: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    numel = max(1, numel // 2) if dtype.is_complex else numel
    before = torch.randn(numel).to(dtype)
    after = (before + size * torch.randn(numel)).to(dtype)
    expected = true_ratio(before, after)
    assert measured([before.clone()], [after]) == pytest.approx([expected], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("shape", [(65,), (100,), (1000,), (128, 128), (48, 7, 5, 5), (3, 4099)])
def test_close_for_dense_updates_of_large_tensors(shape: tuple[int, ...]) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        before = torch.randn(shape)
        after = before + 0.01 * torch.randn(shape)
        (ratio,) = measured([before.clone()], [after])
        assert ratio == pytest.approx(true_ratio(before, after), rel=0.5)


def test_the_error_falls_with_the_root_of_the_samples() -> None:
    errors = {}
    for samples in (16, 1024):
        squares = []
        for seed in range(20):
            torch.manual_seed(seed)
            before = torch.randn(20_000)
            after = before + 0.01 * torch.randn(20_000)
            (ratio,) = measured([before.clone()], [after], samples)
            squares.append((ratio / true_ratio(before, after) - 1.0) ** 2)
        errors[samples] = math.sqrt(sum(squares) / len(squares))
    assert errors[1024] < 0.3 * errors[16]
    assert errors[1024] < 0.06


@pytest.mark.parametrize("numel", [65, 96, 100, 127, 129, 191, 256, 300, 5000])
def test_no_large_part_is_left_out(numel: int) -> None:
    """Updates of one tenth of a tensor only, wherever it is: the estimate is never zero."""
    for tenth in range(10):
        before = torch.ones(numel)
        after = before.clone()
        after[tenth * numel // 10 : (tenth + 1) * numel // 10] *= 2.0
        (ratio,) = measured([before], [after])
        assert ratio == pytest.approx(math.sqrt(0.1), rel=0.5), tenth


def test_no_column_is_taken_for_the_whole_matrix() -> None:
    for columns in (32, 64, 128, 256, 512):
        before = torch.ones(256, columns)
        after = before.clone()
        after[:, ::2] = 1.5
        (ratio,) = measured([before], [after])
        assert ratio == pytest.approx(math.sqrt(0.5) * 0.5, rel=0.3), columns


@given(st.lists(st.sampled_from([(3,), (64,), (5, 40), (2, 3, 4)]), min_size=1, max_size=6))
def test_tensors_keep_apart(shapes: list[tuple[int, ...]]) -> None:
    befores = [torch.full(shape, 2.0) for shape in shapes]
    afters = [b * (1.0 + 0.01 * i) for i, b in enumerate(befores)]
    expected = [true_ratio(b, a) for b, a in zip(befores, afters, strict=True)]
    assert measured([b.clone() for b in befores], afters) == pytest.approx(expected, rel=1e-3)


def test_several_dtypes_together() -> None:
    befores = [torch.full((5,), 2.0, dtype=dtype) for dtype in KINDS]
    assert measured([b.clone() for b in befores], [b * 1.5 for b in befores]) == [0.5] * 4


def test_permuted_storage_is_sampled_as_it_lies() -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    for tensor in (weight, torch.randn(6, 5).t(), torch.randn(2, 3, 4).permute(2, 0, 1)):
        assert measured([tensor], [tensor * 1.25]) == pytest.approx([0.25], rel=0.01)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(8, 8)[:, ::2], torch.ones(4).expand(3, 4)[:, :2], torch.ones(3, 1).expand(3, 4)],
    ids=["every other column", "expanded", "expanded column"],
)
def test_storage_with_holes_is_not_known(tensor: Tensor) -> None:
    sampler = UpdateSampler([torch.ones(3), tensor])
    sampler.ratios()
    ratios = sampler.ratios()
    assert ratios is not None
    assert ratios[0].item() == 0.0
    assert math.isnan(ratios[1].item())


def test_each_call_compares_with_the_call_before() -> None:
    weight = torch.full((10,), 8.0)
    sampler = UpdateSampler([weight])
    sampler.ratios()
    for expected in (0.5, 0.25):
        weight *= 1.0 + expected
        assert sampler.ratios().item() == pytest.approx(expected)


def test_new_storage_is_noticed() -> None:
    weight = torch.nn.Parameter(torch.ones(10))
    sampler = UpdateSampler([torch.ones(3), weight])
    assert not sampler.stale()
    weight.data.mul_(2.0)
    assert not sampler.stale()
    weight.data = weight.data.clone()
    assert sampler.stale()


def test_no_parameters() -> None:
    sampler = UpdateSampler([])
    assert sampler.ratios() is None
    assert not sampler.stale()


def test_nothing_is_read_on_the_host() -> None:
    tensors = [torch.ones(100), torch.ones(5)]
    sampler = UpdateSampler(tensors)
    forecast = UpdateForecast()
    with OperationLog() as log:
        for _ in range(3):
            forecast.ratios(torch.ones(2))
            forecast.record(sampler.ratios())
    assert log.names
    assert log.count("_local_scalar_dense") == 0


# -- forecast -------------------------------------------------------------------------------------


def test_without_a_past_there_is_no_forecast() -> None:
    forecast = UpdateForecast()
    assert forecast.ratios(torch.ones(2)) is None
    forecast.record(None)
    assert forecast.ratios(torch.ones(2)) is None
    forecast.record(torch.tensor([0.1, 0.2]))
    assert forecast.ratios(torch.ones(2)).tolist() == pytest.approx([0.1, 0.2])


@given(
    ratio=st.floats(1e-5, 1.0),
    norm=st.floats(1e-3, 1e3),
    growth=st.floats(1e-3, 1e3),
)
def test_it_grows_with_the_gradient_and_never_falls_with_it(
    ratio: float, norm: float, growth: float
) -> None:
    forecast = UpdateForecast()
    forecast.ratios(torch.tensor([norm]))
    forecast.record(torch.tensor([ratio]))
    result = forecast.ratios(torch.tensor([norm * growth]))
    assert result.item() == pytest.approx(ratio * max(1.0, growth), rel=1e-4)


def test_what_cannot_be_known_is_nan() -> None:
    forecast = UpdateForecast()
    forecast.ratios(torch.tensor([1.0, math.nan, 1.0]))
    forecast.record(torch.tensor([math.nan, 0.1, 0.1]))
    result = forecast.ratios(torch.tensor([1.0, 1.0, 1.0])).tolist()
    assert [math.isnan(value) for value in result] == [True, True, False]


def test_a_tensor_that_stood_still_is_not_expected_to_stay_so() -> None:
    forecast = UpdateForecast()
    forecast.ratios(torch.tensor([0.0, 1.0, 1.0]))
    forecast.record(torch.tensor([0.0, 0.0, 0.0]))
    result = forecast.ratios(torch.tensor([1e-3, 1e7, 1.0])).tolist()
    assert result[0] > 1.0
    assert result[1] > 0.1
    assert result[2] < 1e-3, "a tensor that does not move is copied for ever"


def test_one_pause_does_not_let_a_large_update_be_forgotten() -> None:
    forecast = UpdateForecast()
    forecast.ratios(torch.ones(1))
    forecast.record(torch.tensor([0.1]))
    forecast.ratios(torch.ones(1))
    forecast.record(torch.tensor([0.0]))
    assert forecast.ratios(torch.ones(1)).item() > 0.05
