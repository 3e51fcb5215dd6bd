"""How fast the gradient changes on its way back through the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
