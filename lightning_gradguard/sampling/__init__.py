"""When to measure what is too costly for every step, and when the readings are on the host."""

from __future__ import annotations

from lightning_gradguard.sampling.layers import LAYERS_EVERY_N_STEPS, LayerSampler
from lightning_gradguard.sampling.time import (
    CHEAP_EVERY_N_STEPS,
    EXACT_EVERY_N_STEPS,
    TimeModules,
    TimeSampler,
)

__all__ = [
    "CHEAP_EVERY_N_STEPS",
    "EXACT_EVERY_N_STEPS",
    "LAYERS_EVERY_N_STEPS",
    "LayerSampler",
    "TimeModules",
    "TimeSampler",
]
