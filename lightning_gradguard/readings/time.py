"""How the gradient travels through time, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

# The horizon: how far the gradient goes until it has changed by three orders of magnitude.
HORIZON_FACTOR = 1e3
# Timesteps of a longer sequence share bins, so that memory does not grow with its length.
MAX_BINS = 256


@dataclass(frozen=True)
class TimeReading:
    """How the gradient travels through time in one layer and direction of a module.

    Attributes:
        module: Path of the module.
        part: Layer and direction as in torch's parameter names, ``"l0"`` or ``"l1_reverse"``;
            empty where the module is watched as a whole.
        source: ``"exact"`` from the adjoint of every state, ``"input"`` from the gradient of the
            module's input (the whole signal, through one matrix), ``"output"`` from the gradient
            of its output (of modules without a recurrence, where that is the whole signal).
        kind: What the module is: ``"lstm"``, ``"gru"``, ``"tanh"``, ``"relu"``, ``"leaky_relu"``,
            ``"prelu"``, or ``"other"``.
        timesteps: Length of the longest sequence, T.
        sequences: Sequences that the reading rests on.
        decay_rate: Mean log transport gain, nats per step back in time: below 0 the gradient
            vanishes, above it explodes. NaN where it is not known, and then ``note`` says why.
        decay_error: Half width of its 95% confidence interval, from blocks of sequences; NaN with
            fewer than two blocks.
        steps: Steps back in time that the rate rests on.
        recency: Share of the squared input gradient in the last tenth of the sequences, between 0
            and 1 (0.1: all timesteps weigh the same).
        profile: Gradient norm per timestep, root mean square over the sequences that reach it; of
            T > 256 timesteps, that of 256 bins.
        entry: Share of the squared gradient that enters at each timestep directly from the loss, in
            the same bins; empty if it is not known.
        causes: What the rate follows from: ``forget_gate``, ``update_gate`` (means), or
            ``activation_slope`` (mean) and ``spectral_radius``.
        note: Why a number is missing; empty if none is.
        step: Optimizer step of the measurement.
        bias: Whether the module has biases, by which gates can be made to keep the state.

    Example:
        >>> reading = TimeReading("rnn", "l0", "exact", "tanh", timesteps=50, decay_rate=-0.2231)
        >>> round(reading.half_life, 1), round(reading.horizon)
        (3.1, 31)
        >>> TimeReading.from_dict(reading.to_dict()) == reading
        True
    """

    module: str
    part: str
    source: Literal["exact", "input", "output"]
    kind: str = "other"
    timesteps: int = 0
    sequences: int = 0
    decay_rate: float = math.nan
    decay_error: float = math.nan
    steps: int = 0
    recency: float = math.nan
    profile: tuple[float, ...] = field(default=(), repr=False)
    entry: tuple[float, ...] = field(default=(), repr=False)
    causes: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    step: int = 0
    bias: bool = True

    @property
    def name(self) -> str:
        """Module and part, as in metric keys: ``"rnn/l0"``."""
        return f"{self.module}/{self.part}" if self.part else self.module

    @property
    def half_life(self) -> float:
        """Steps in which the gradient halves (or doubles, with a rate above 0): ln 2 / |rate|."""
        return _steps_for(2.0, self.decay_rate)

    @property
    def horizon(self) -> float:
        """Steps in which it shrinks (or grows) by 10³: ln 10³ / |rate|; compare with T."""
        return _steps_for(HORIZON_FACTOR, self.decay_rate)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON or a checkpoint."""
        values = asdict(self)
        return {**values, "profile": list(self.profile), "entry": list(self.entry)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TimeReading:
        """The inverse of :meth:`to_dict`."""
        return cls(
            **{**values, "profile": tuple(values["profile"]), "entry": tuple(values["entry"])}
        )


def _steps_for(factor: float, rate: float) -> float:
    if math.isnan(rate):
        return math.nan
    return math.log(factor) / abs(rate) if rate else math.inf
