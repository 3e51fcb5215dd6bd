"""Synthetic inspections of a small network, and runs made of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from lightning_gradguard.diagnose import Detector, Finding, Observation, layer_detectors
from lightning_gradguard.readings import (
    ActivationReading,
    Inspection,
    ModelFacts,
    ParameterReading,
)

Run = list[Observation]
Layers = Sequence[ParameterReading]
Loss = Callable[[int], float | None]
LAYERS = 6
UNKNOWN = ModelFacts()


def is_inspected(step: int, every: int = 50) -> bool:
    """Steps 0, 1, 2, 4, 8, 16, 32 and then every 50th."""
    return step in (0, 1, 2, 4, 8, 16, 32) or (step > 0 and step % every == 0)


def weight(name: str, **changes: Any) -> ParameterReading:
    """A weight matrix in good order."""
    usual = ParameterReading(
        name,
        elements=4096,
        used=True,
        grad_norm=0.1,
        weight_norm=4.0,
        update_ratio=1e-3,
        lr=1e-3,
        zero_share=0.0,
        tiny_share=0.0,
        dead_rows=0.0,
    )
    return replace(usual, **changes)


def bias(name: str, **changes: Any) -> ParameterReading:
    return weight(name, **{"elements": 64, "dims": 1, "dead_rows": math.nan, **changes})


def layer(name: str, **changes: Any) -> list[ParameterReading]:
    """A weight and a bias with the same changes."""
    return [weight(f"{name}.weight", **changes), bias(f"{name}.bias", **changes)]


def network(
    odd: dict[int, dict[str, Any]] | None = None, layers: int = LAYERS, **changes: Any
) -> list[ParameterReading]:
    """Layers `net.0`, `net.1`, ..., of which the odd ones have changes of their own."""
    odd = odd or {}
    return [
        reading
        for i in range(layers)
        for reading in layer(f"net.{i}", **{**changes, **odd.get(i, {})})
    ]


def relu(dead: float, module: str = "net.act", **changes: Any) -> ActivationReading:
    usual = ActivationReading(module, "relu", units=64, examples=1024, dead=dead, inactive=0.6)
    return replace(usual, **changes)


def tanh(saturated: float, module: str = "net.act", **changes: Any) -> ActivationReading:
    usual = ActivationReading(module, "tanh", units=64, examples=1024, saturated=saturated)
    return replace(usual, **changes)


def run(
    look: Callable[[int], Layers | Inspection],
    loss: Loss,
    n: int = 400,
    *,
    every: int = 50,
    model: ModelFacts = UNKNOWN,
    delay: int = 0,
) -> Run:
    """A run with the usual inspections, which may reach the detectors some steps late."""
    steps = []
    for step in range(n):
        inspection = None
        if step >= delay and is_inspected(step - delay, every):
            seen = look(step - delay)
            if isinstance(seen, Inspection):
                inspection = replace(seen, step=step - delay)
            else:
                inspection = Inspection(step - delay, tuple(seen))
        steps.append(Observation(step, loss(step), 1.0, inspection=inspection, model=model))
    return steps


def looking(
    parameters: Layers | None = None, *activations: ActivationReading, **depth: Any
) -> Callable[[int], Inspection]:
    """The same at every inspection."""
    seen = tuple(network() if parameters is None else parameters)
    return lambda step: Inspection(step, seen, tuple(activations), **depth)


def diagnose(steps: Iterable[Observation], detectors: Sequence[Detector] | None = None) -> Any:
    detectors = layer_detectors() if detectors is None else detectors
    return [f for step in steps for d in detectors for f in d.observe(step)]


def facts(findings: Iterable[Finding]) -> list[tuple[str, str, str, int]]:
    return [(f.pathology.value, f.severity.label, f.where, f.step) for f in findings]


def stuck(seed: int = 0, level: float = 2.3, noise: float = 0.02) -> Callable[[int], float]:
    rng = random.Random(seed)
    values = [level + rng.gauss(0.0, noise) for _ in range(4000)]
    return values.__getitem__


def learning(step: int) -> float:
    """Falls from the first step, as good runs do."""
    return (0.3 + 2.0 * math.exp(-step / 60.0)) * (1.0 + 0.02 * math.sin(9.0 * step))


def spoiled(step: int) -> float:
    """Learns, and gives it all back from step 200 on."""
    return learning(step) if step < 200 else 4.0 + 0.02 * math.sin(9.0 * step)
