"""How fast the gradient changes on its way back through the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_gradguard.measure._layers import layer_index
from lightning_gradguard.measure.student_t import student_t

_FEWEST_LAYERS = 3


@dataclass(frozen=True)
class DepthSlope:
    """Slope of the relative gradient norm on depth.

    Attributes:
        slope: Nats per layer back from the output: below 0 the gradient vanishes on its way to the
            input, above it explodes. NaN with fewer than three usable layers.
        error: Half width of its 95% confidence interval; NaN with fewer than three usable layers.
        layers: Number of layers that the slope rests on.
    """

    slope: float
    error: float
    layers: int


def depth_slope(
    names: Sequence[str], grad_norms: Sequence[float], weight_norms: Sequence[float]
) -> DepthSlope:
    """Least-squares slope of log(‖g‖/‖W‖) on the number of layers back from the output.

    Relative to its weights, since layers of different sizes have gradients of different sizes.
    Layers whose norms are zero or not finite are left out, but keep their place in the count.

    Args:
        names: Names of the layers, in forward order.
        grad_norms: Norm of each layer's gradient.
        weight_norms: Norm of each layer's weights.

    Raises:
        ValueError: If the three differ in length.

    Example:
        >>> result = depth_slope(["a", "b", "c", "d"], [1e-3, 1e-2, 1e-1, 1.0], [1.0] * 4)
        >>> round(result.slope, 4), result.layers
        (-2.3026, 4)
    """
    lengths = len(names), len(grad_norms), len(weight_norms)
    if len(set(lengths)) != 1:
        raise ValueError(
            "names, grad_norms and weight_norms must have one entry per layer each, got "
            f"{lengths[0]}, {lengths[1]} and {lengths[2]}"
        )
    points = [
        (len(names) - 1 - place, math.log(grad) - math.log(weight))
        for place, (grad, weight) in enumerate(zip(grad_norms, weight_norms, strict=True))
        if _usable(grad) and _usable(weight)
    ]
    if len(points) < _FEWEST_LAYERS:
        return DepthSlope(math.nan, math.nan, len(points))
    return _fit(points)


def weight_depth_slope(norms: Mapping[str, tuple[float, float]]) -> DepthSlope:
    """The slope from weight matrices by their names.

    Give it weights alone: biases and scales have no fan-in to compare gradients by.

    Args:
        norms: Norms of the gradient and of the values of each weight, in forward order. Those of
            one layer are taken together.

    Example:
        >>> norms = {f"{place}.weight": (10.0**place, 1.0) for place in range(4)}
        >>> round(weight_depth_slope(norms).slope, 4)
        -2.3026
    """
    # Under a name for the root, whose own parameters would be a layer each.
    layers, numbers = layer_index(f"model.{name}" for name in norms)
    grads, weights = [0.0] * len(layers), [0.0] * len(layers)
    for number, (grad, weight) in zip(numbers, norms.values(), strict=True):
        grads[number] = math.hypot(grads[number], grad)
        weights[number] = math.hypot(weights[number], weight)
    return depth_slope(layers, grads, weights)


def _usable(norm: float) -> bool:
    return math.isfinite(norm) and norm > 0


def _fit(points: Sequence[tuple[int, float]]) -> DepthSlope:
    number = len(points)
    mean_x = sum(x for x, _ in points) / number
    mean_y = math.fsum(y for _, y in points) / number
    spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    residual = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    error = student_t(number - 2) * math.sqrt(residual / (number - 2) / spread)
    return DepthSlope(slope, error, number)
