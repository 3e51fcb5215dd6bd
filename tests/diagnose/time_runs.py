"""Synthetic readings through time, and runs made of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from lightning_gradguard.diagnose import (
    Finding,
    Observation,
    Severity,
    TimeDetector,
    time_detectors,
)
from lightning_gradguard.readings import TimeReading
from tests.diagnose.traces import curve

Run = list[Observation]
EVERY = 10
CAUSES = {
    "lstm": {"forget_gate": 0.52},
    "gru": {"update_gate": 0.48},
    "tanh": {"activation_slope": 0.61, "spectral_radius": 0.58},
    "relu": {"activation_slope": 0.5, "spectral_radius": 1.9},
    "leaky_relu": {"activation_slope": 0.6, "spectral_radius": 1.7},
    "prelu": {"activation_slope": 0.7},
    "other": {},
}


def reading(rate: float, **changes: Any) -> TimeReading:
    """A reading of layer 0 of `rnn`: a stuck LSTM at its default initialization, if -0.44."""
    usual = TimeReading(
        "rnn",
        "l0",
        "exact",
        "lstm",
        timesteps=120,
        sequences=32,
        decay_rate=rate,
        decay_error=0.01,
        steps=119,
        recency=0.99,
    )
    changes = {"causes": CAUSES[changes.get("kind", "lstm")], **changes}
    return replace(usual, **changes)


def run(
    rate: Callable[[int], float | Sequence[TimeReading]],
    loss: Callable[[int], float | None],
    n: int = 600,
    every: int = EVERY,
    **changes: Any,
) -> Run:
    """A run with readings at every `every`-th step."""
    steps = []
    for step in range(n):
        time: tuple[TimeReading, ...] = ()
        if step % every == 0:
            value = rate(step)
            one = isinstance(value, (int, float))
            time = (reading(value, **changes),) if one else tuple(value)  # type: ignore[arg-type]
        steps.append(Observation(step, loss(step), 1.0, None, time))
    return steps


def diagnose(steps: Iterable[Observation], detectors: list[TimeDetector] | None = None) -> Any:
    detectors = time_detectors() if detectors is None else detectors
    return [f for step in steps for d in detectors for f in d.observe(step)]


def severities(findings: list[Finding]) -> list[Severity]:
    return [f.severity for f in findings]


def stuck(seed: int = 0, level: float = 2.3, noise: float = 0.02) -> Callable[[int], float]:
    rng = random.Random(seed)
    return lambda step: level + rng.gauss(0.0, noise)


def steady(value: float) -> Callable[[int], float]:
    return lambda _: value


def solved(step: int) -> float:
    return curve(step, 600) * (1.0 + 0.02 * math.sin(9.0 * step))
