"""Clipping is what torch's own function computes, and nothing at all where nothing is to clip."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.measure import NormMeter
from lightning_gradguard.respond import AdaptiveClip
from lightning_gradguard.respond.apply import FusedControls, apply_on_host
from lightning_gradguard.respond.clip_coefficients import clip_coefficient
from lightning_gradguard.respond.ladder import StepPlan
from tests.measure.dispatch import OperationLog

SHAPES = ((7, 5), (11,), (3, 2, 2))


def parameters_with_gradients(scale: float, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * scale
    return parameters


def total_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    return NormMeter((str(i), p) for i, p in enumerate(parameters)).measure().total


@given(
    scale=st.floats(1e-6, 1e6),
    share=st.floats(1e-3, 1e3),
    seed=st.integers(0, 100),
)
def test_same_as_clip_grad_norm(scale: float, share: float, seed: int) -> None:
    ours, theirs = (parameters_with_gradients(scale, seed) for _ in range(2))
    norm = total_norm(ours).item()
    threshold = share * norm
    coefficient = apply_on_host(StepPlan(clip_threshold=threshold), norm, ours)
    expected = nn.utils.clip_grad_norm_(theirs, threshold)
    assert norm == pytest.approx(expected.item(), rel=1e-5)
    # torch adds 1e-6 to the norm before it divides
    slack = 1e-5 + 1e-6 / norm
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=slack, atol=0.0)
    assert coefficient == min(1.0, threshold / norm)


def test_fused_kernels_divide_by_what_clip_grad_norm_multiplies_with() -> None:
    for threshold in (0.1, 100.0, math.inf):
        ours, theirs = (parameters_with_gradients(1.0) for _ in range(2))
        optimizers = [torch.optim.SGD(p, lr=1.0, fused=True) for p in (ours, theirs)]
        controls = FusedControls(optimizers[0])
        coefficient = controls.apply(StepPlan(clip_threshold=threshold), total_norm(ours))
        optimizers[0].step()
        controls.restore()
        norm = nn.utils.clip_grad_norm_(theirs, threshold)
        optimizers[1].step()
        assert coefficient.item() == pytest.approx(min(1.0, threshold / norm.item()), rel=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_nothing_is_multiplied_where_nothing_is_to_clip() -> None:
    parameters = parameters_with_gradients(1.0)
    norm = total_norm(parameters).item()
    before = [p.grad.clone() for p in parameters]
    with OperationLog() as log:
        assert apply_on_host(StepPlan(clip_threshold=1.01 * norm), norm, parameters) == 1.0
        assert apply_on_host(StepPlan(), norm, parameters) == 1.0
    assert log.names == []
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))


def test_one_call_clips_every_gradient() -> None:
    parameters = parameters_with_gradients(1.0)
    norm = total_norm(parameters).item()
    with OperationLog() as log:
        apply_on_host(StepPlan(clip_threshold=0.5 * norm), norm, parameters)
    assert log.count("_foreach_mul_") == 1
    assert len(log.names) == 1


def test_parameters_without_gradient_are_left_out() -> None:
    parameters = parameters_with_gradients(1.0)
    parameters[1].grad = None
    norm = total_norm(parameters).item()
    apply_on_host(StepPlan(clip_threshold=0.5 * norm), norm, parameters)
    assert parameters[1].grad is None
    assert total_norm(parameters).item() == pytest.approx(0.5 * norm)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_not_clipped(norm: float) -> None:
    """Multiplying would spread one infinity to every gradient; dropping is for another rung."""
    parameters = parameters_with_gradients(1.0)
    before = [p.grad.clone() for p in parameters]
    assert apply_on_host(StepPlan(clip_threshold=1.0), norm, parameters) == 1.0
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nor_is_it_inside_a_fused_kernel(value: float) -> None:
    parameters = parameters_with_gradients(1.0)
    parameters[0].grad[0, 0] = value
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
    controls = FusedControls(optimizer)
    expected = -parameters[1].grad
    coefficient = controls.apply(StepPlan(clip_threshold=1.0), total_norm(parameters))
    optimizer.step()
    controls.restore()
    assert coefficient.item() == 1.0
    torch.testing.assert_close(parameters[1].detach(), expected)


@given(norm=st.floats(0.0, 1e150), threshold=st.floats(1e-150, 1e150))
def test_the_coefficient_brings_the_norm_to_the_threshold(norm: float, threshold: float) -> None:
    coefficient = clip_coefficient(norm, threshold)
    assert 0.0 <= coefficient <= 1.0
    assert coefficient * norm <= threshold * (1.0 + 1e-12)
    assert (coefficient == 1.0) == (norm <= threshold) or norm == pytest.approx(threshold)


def test_threshold_of_the_settings() -> None:
    assert AdaptiveClip(multiple=3.0).threshold(0.5) == 1.5
    assert AdaptiveClip().threshold(None) == math.inf
