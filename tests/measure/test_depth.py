"""Depth slopes against numpy's fit and simulated noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.measure.depth import DepthSlope, depth_slope
from lightning_gradguard.measure.student_t import student_t

LOGS = st.lists(st.floats(-20.0, 20.0), min_size=3, max_size=30)


def slope_of(logs: list[float], weights: list[float] | None = None) -> DepthSlope:
    weights = [1.0] * len(logs) if weights is None else weights
    grads = [math.exp(log) * weight for log, weight in zip(logs, weights, strict=True)]
    return depth_slope([str(place) for place in range(len(logs))], grads, weights)


@given(logs=LOGS, scale=st.floats(1e-6, 1e6))
def test_same_as_numpy_whatever_the_scale(logs: list[float], scale: float) -> None:
    weights = [scale * (1 + place) for place in range(len(logs))]
    result = slope_of(logs, weights)
    back = np.arange(len(logs))[::-1]
    assert result.slope == pytest.approx(np.polyfit(back, logs, 1)[0], rel=1e-9, abs=1e-9)
    assert result.layers == len(logs)


@given(slope=st.floats(-3.0, 3.0), layers=st.integers(3, 40))
def test_a_straight_line_has_no_error(slope: float, layers: int) -> None:
    result = slope_of([slope * (layers - 1 - place) for place in range(layers)])
    assert result.slope == pytest.approx(slope, abs=1e-9)
    assert result.error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("of_weights", [False, True])
def test_unusable_layers_keep_their_place(bad: float, of_weights: bool) -> None:
    grads, weights = [math.exp(-0.5 * back) for back in (5, 4, 3, 2, 1, 0)], [1.0] * 6
    (weights if of_weights else grads)[2] = bad
    result = depth_slope(list("abcdef"), grads, weights)
    assert result.slope == pytest.approx(-0.5)
    assert result.layers == 5


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_too_few_layers(layers: int) -> None:
    result = slope_of([0.0, 1.0][:layers])
    assert result.layers == layers
    assert math.isnan(result.slope)
    assert math.isnan(result.error)


def test_norms_at_the_ends_of_the_float_range() -> None:
    result = depth_slope(list("abc"), [1e-300, 1.0, 1e300], [1e300, 1.0, 1e-300])
    assert result.slope == pytest.approx(-600 * math.log(10))


@pytest.mark.parametrize("layers", [3, 4, 10])
def test_interval_covers_the_true_slope(layers: int) -> None:
    noise = np.random.default_rng(0).normal(0.0, 0.3, size=(2000, layers))
    true = -0.2 * np.arange(layers)[::-1]
    results = [slope_of(list(true + each)) for each in noise]
    covered = sum(abs(result.slope + 0.2) <= result.error for result in results)
    assert 0.935 <= covered / len(results) <= 0.965


def test_lengths_that_differ() -> None:
    with pytest.raises(ValueError, match="one entry per layer each, got 2, 2 and 1"):
        depth_slope(["a", "b"], [1.0, 1.0], [1.0])


def relative_norms(activation: type[nn.Module]) -> DepthSlope:
    layers = [nn.Linear(64, 64) for _ in range(12)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, activation())))
    model(torch.randn(32, 64)).square().mean().backward()
    grads = [layer.weight.grad.double().norm().item() for layer in layers]
    weights = [layer.weight.norm().item() for layer in layers]
    return depth_slope([str(place) for place in range(12)], grads, weights)


def test_sigmoids_vanish_with_depth() -> None:
    result = relative_norms(nn.Sigmoid)
    assert result.slope + result.error < -1.0  # a sigmoid's slope is at most 1/4


# Quantiles from SciPy.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.70620), (2, 4.302653), (3, 3.182446), (4, 2.776445), (7, 2.364624), (30, 2.042272)],
)
def test_student_t(degrees: int, quantile: float) -> None:
    assert student_t(degrees) == pytest.approx(quantile, rel=2e-3)
