"""What a detector is given, and what it has to offer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_gradguard.diagnose.findings import Finding
from lightning_gradguard.readings import Inspection, ModelFacts, NonFiniteOrigin, TimeReading


@dataclass(frozen=True)
class Observation:
    """What is known about one optimizer step.

    Attributes:
        step: Number of the optimizer step.
        loss: Training loss, `None` where it is not known; may be negative, NaN or infinite.
        total_norm: L2 norm of all gradients before any clipping; may be NaN or infinite.
        norms: L2 norm per parameter name in forward order, on steps where they were read.
        time: How the gradient travels through time, one reading per module or per layer and
            direction of it, on steps where it was measured; empty on all others.
        inspection: A look at every layer, on sampled steps; `None` on all others. It may be a few
            steps older than the observation.
        lr: Learning rate of the first group, as the schedule sets it; NaN if not known.
        new_phase: Whether the run changed course before this step: the learning rate jumped, or
            other parameters are trained. Levels learned before it are no measure any more.
        origin: Where NaN or Inf first appeared, if that was looked for.
        model: What is known about the model.
    """

    step: int
    loss: float | None
    total_norm: float
    norms: Mapping[str, float] | None = None
    time: tuple[TimeReading, ...] = ()
    inspection: Inspection | None = None
    lr: float = math.nan
    new_phase: bool = False
    origin: NonFiniteOrigin | None = None
    model: ModelFacts = field(default_factory=ModelFacts)


class Detector(Protocol):
    """Looks at one observation after another and reports what is wrong.

    A finding is returned once, when it opens, and again only if the same episode turns more
    severe. The detector re-arms when the symptom has been gone for a while, and from then on
    `is_open` says so.
    """

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step and returns what became known with it."""

    def is_open(self, where: str) -> bool:
        """Whether what was found at this place has not healed."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers, strings, lists and dicts."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state, after which the detector continues bit for bit."""

    def reset(self) -> None:
        """Forgets everything."""


class TimeDetector(Detector, Protocol):
    """A detector of readings through time, which come only now and then.

    Its findings are for people and cause no response: every rank reads its own sequences.
    """

    @property
    def wants_exact(self) -> bool:
        """Whether another exact reading, now, would help to decide."""
