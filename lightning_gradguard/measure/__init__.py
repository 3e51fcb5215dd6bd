"""Gradients to numbers: what a backward pass left on the parameters, measured on their device."""

from __future__ import annotations

from lightning_gradguard.measure.norms import (
    GradNorms,
    NormMeter,
    clean_name,
    grad_norms,
    layer_index,
)

__all__ = ["GradNorms", "NormMeter", "clean_name", "grad_norms", "layer_index"]
