"""Whether all ways lead to the same numbers.

Shape suffixes: ``T`` time, ``B`` batch, ``H`` hidden.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timesteps.models import Task
from lightning_gradguard.measure.adjoint import recurrent_adjoint
from lightning_gradguard.measure.timesteps import TimestepProbe

# A norm below this many times the smallest normal number may rest on numbers that have lost digits.
_DIGITS = 1e6


def compare_gradients(task: Task) -> dict[str, Any]:
    """The largest relative difference of dL/dh_t and dL/dc_t to those of unrolled cells.

    The norm of the difference over the norm, at the timestep where it is largest, of those that
    the gradient reaches with all its digits.
    """
    twin = task.unrolled()
    with _all_bits():
        twin.backward()
        hidden_TBH = torch.stack([h.detach() for h in twin.cells.hidden])
        result = recurrent_adjoint(
            task.classifier.rnn,
            task.classifier.embedding(task.inputs).detach(),
            grad_output=task.direct_gradient(hidden_TBH),
        )
    hidden, timesteps = _difference(result.hidden[0], twin.cells.hidden)
    cell = None if result.cell is None else _difference(result.cell[0], twin.cells.cells)[0]
    return {"hidden": hidden, "cell": cell, "timesteps": timesteps}


@contextlib.contextmanager
def _all_bits() -> Iterator[None]:
    """Keep cuDNN from rounding to 10 bits, as it may by default and the cells do not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _difference(ours_TBH: Tensor, states: Sequence[Tensor]) -> tuple[float, int]:
    theirs_TBH = torch.stack([s.grad for s in states if s.grad is not None]).double()
    norms_T = torch.linalg.vector_norm(theirs_TBH, dim=(1, 2))
    apart_T = torch.linalg.vector_norm(ours_TBH.double() - theirs_TBH, dim=(1, 2))
    floor = _DIGITS * torch.finfo(states[0].dtype).tiny
    usable_T = ~(norms_T <= floor)  # NaN is not below it
    return float((apart_T / norms_T)[usable_T].max()), int(usable_T.sum())


def compare_rates(task: Task) -> dict[str, Any]:
    """Decay rates of one batch and the same weights from both measurements, nats per step back.

    ``None`` for a measurement that was not made, and then ``notes`` says why.
    """
    rates: dict[str, Any] = {"exact": None, "cheap": None, "notes": []}
    with TimestepProbe(task.model) as probe:
        for name, source in (("exact", "exact"), ("cheap", "input")):
            probe.exact = name == "exact"
            task.backward()
            (reading,) = probe.measure()
            if reading.source == source and math.isfinite(reading.decay_rate):
                rates[name] = reading.decay_rate
            else:
                rates["notes"].append(f"{name}: {reading.note}")
    return rates
