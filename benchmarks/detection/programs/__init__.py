"""Programs that people might have written, with a fault or without, by family."""

from __future__ import annotations

from benchmarks.detection.programs import (
    deep,
    groups,
    instability,
    layers,
    learning_rate,
    loss,
    non_finite,
    normalization,
    precision,
    recurrent,
    units,
)
from benchmarks.detection.records import Program

ALL: tuple[Program, ...] = (
    *recurrent.PROGRAMS,
    *deep.PROGRAMS,
    *learning_rate.PROGRAMS,
    *loss.PROGRAMS,
    *instability.PROGRAMS,
    *non_finite.PROGRAMS,
    *precision.PROGRAMS,
    *units.PROGRAMS,
    *layers.PROGRAMS,
    *groups.PROGRAMS,
    *normalization.PROGRAMS,
)

__all__ = ["ALL"]
