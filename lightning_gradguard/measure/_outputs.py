"""Modules without a recurrence, watched on their output: attention, convolution, anything else.

Shape suffixes: ``T`` time, ``B`` batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.measure._drafts import Draft, doubts, reached, stacked
from lightning_gradguard.measure._taps import (
    Switch,
    attach,
    attach_to_evaluation,
    feature_norms,
    is_plain,
    listen,
)
from lightning_gradguard.measure._watch import Watch
from lightning_gradguard.measure.decay import bin_profile, recency
from lightning_gradguard.readings import TimeReading

_MOST_CALLS = 8
_MOST_NORMS = 2**20
_NO_RATE = "no recurrence: nothing is carried from timestep to timestep, so there is no decay rate"


class OutputWatch(Watch[nn.Module]):
    """Sees the gradient of the output of one module; see :class:`Watch`.

    Args:
        name: Path of the module.
        module: The module.
        axis: Time axis of its output, or ``None`` to follow ``batch_first``.
        switch: Of the probe.
    """

    def __init__(self, name: str, module: nn.Module, axis: int | None, switch: Switch) -> None:
        super().__init__(name, module, switch)
        self._axis = axis
        self._norms: dict[int, Tensor] = {}
        self._aside = False

    def attach(self) -> None:
        """Begin to see calls."""
        self._aside = False
        self._handles = attach(self.module, self._switch, after=self.after)
        if isinstance(self.module, nn.TransformerEncoderLayer):
            # In evaluation it has a fast path, which it leaves if it has any hook: so there it has
            # none, from the first call on until the next measurement.
            aside = attach_to_evaluation(self.module, self._switch, self._step_aside)
            self._handles.append(aside)

    def detach(self) -> None:
        """Take the hooks off."""
        self._aside = False
        super().detach()

    def _step_aside(self) -> None:
        self.detach()
        self._aside = True

    def forget(self) -> None:
        """Begin a new measurement."""
        super().forget()
        self._norms = {}
        if self._aside:
            self.attach()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """See the output."""
        value = _first_tensor(output)
        if value is None or self.reason:
            return
        self.seen = True
        axis = self._time_axis(value)
        if axis is None or not value.numel() or self._number >= _MOST_CALLS:
            return
        number, generation = self._number, self.generation
        self._number += 1

        def arrived(grad: Tensor) -> None:
            if generation == self.generation:
                norms_TB = _norms(grad, axis)
                before_TB = self._norms.get(number)
                self._norms[number] = (
                    norms_TB if before_TB is None else torch.hypot(before_TB, norms_TB)
                )

        listen(value, arrived, self._switch)

    def drafts(self) -> list[Draft]:
        """The reading of all its calls."""
        if not self._norms:
            return []
        norms_TB = stacked([self._norms[number] for number in sorted(self._norms)])
        reached_TB = reached(norms_TB)
        timesteps, sequences = norms_TB.shape
        reading = TimeReading(self.name, "", "output", "other", timesteps, sequences, note=_NO_RATE)
        return [
            Draft(
                reading,
                numbers={
                    "recency": recency(norms_TB, reached_TB.sum(0)),
                    "profile": bin_profile(norms_TB, reached_TB),
                },
                doubts=doubts(norms_TB),
            )
        ]

    def _time_axis(self, value: Tensor) -> int | None:
        axis = self._axis
        if axis is None:
            axis = 1 if value.dim() == 3 and self._batch_first() else 0
        if -value.dim() <= axis < value.dim():
            return axis % value.dim()
        self.reason = (
            f"the output of {self.name!r} has {value.dim()} dimensions, and so no time axis {axis}"
        )
        return None

    def _batch_first(self) -> bool:
        modules = self.module.modules()
        attention = next((m for m in modules if isinstance(m, nn.MultiheadAttention)), None)
        return bool(getattr(attention, "batch_first", False))


def _first_tensor(output: Any) -> Tensor | None:
    """The output, or the first tensor among several."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        output = next((value for value in output if isinstance(value, Tensor)), None)
    return output if is_plain(output) else None


def _norms(grad: Tensor, axis: int) -> Tensor:
    """(T, B) norms; the batch is the first dimension that is not time, if more than one is left."""
    grad = grad.movedim(axis, 0)
    if grad.dim() == 1 or (grad.dim() == 2 and axis == 0):
        grad = grad.unsqueeze(1)
    norms_TB = feature_norms(grad, range(2, grad.dim()), fast=True)
    stride = -(-norms_TB.numel() // _MOST_NORMS)
    return norms_TB[:, :: max(1, stride)]
