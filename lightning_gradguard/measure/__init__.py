"""Gradients to numbers: their norms, and their way back through time and depth."""

from __future__ import annotations

from lightning_gradguard.measure.adjoint import RecurrentAdjoint, ReplayError, recurrent_adjoint
from lightning_gradguard.measure.depth import DepthSlope, depth_slope
from lightning_gradguard.measure.norms import (
    GradNorms,
    NormMeter,
    clean_name,
    grad_norms,
    layer_index,
)
from lightning_gradguard.measure.timesteps import TimestepProbe

__all__ = [
    "DepthSlope",
    "GradNorms",
    "NormMeter",
    "RecurrentAdjoint",
    "ReplayError",
    "TimestepProbe",
    "clean_name",
    "depth_slope",
    "grad_norms",
    "layer_index",
    "recurrent_adjoint",
]
