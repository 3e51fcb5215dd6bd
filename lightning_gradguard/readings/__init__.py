"""Measurements as plain numbers: what `measure` has read and every later room works with."""

from __future__ import annotations

from lightning_gradguard.readings.layers import (
    ActivationReading,
    Inspection,
    NonFiniteOrigin,
    ParameterReading,
)
from lightning_gradguard.readings.model import ModelFacts
from lightning_gradguard.readings.seen import Seen
from lightning_gradguard.readings.time import HORIZON_FACTOR, MAX_BINS, TimeReading

__all__ = [
    "HORIZON_FACTOR",
    "MAX_BINS",
    "ActivationReading",
    "Inspection",
    "ModelFacts",
    "NonFiniteOrigin",
    "ParameterReading",
    "Seen",
    "TimeReading",
]
