"""Calls of a fused recurrent module: what each leaves behind for a measurement.

Shape suffixes: ``T`` time, ``B`` batch, ``K`` layers times directions.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.measure._call_shape import CallShape, Sequences
from lightning_gradguard.measure._capture import Capture, RecurrentModule
from lightning_gradguard.measure._taps import (
    FAST_FLOOR,
    Switch,
    feature_norms,
    is_plain,
    listen,
    tap,
    trains,
)
from lightning_gradguard.measure._watch import CallWatch, WatchedCall
from lightning_gradguard.measure.decay import float_floor

# Calls of one module in a step that are kept; a model that makes more has many alike.
MOST_CALLS = 8


class RecurrentCall(WatchedCall):
    """One call: norms on every step, and a capture for the exact measurement if it was on.

    Attributes:
        input_norms: Norm of the gradient of the input at each timestep, in the input's layout.
        entry_norms: That of the output.
        end_norms: Those of h_n and c_n, per layer and direction.
        floor: Norm below which those of the input are not known well.
    """

    def __init__(
        self, watch: RecurrentWatch, number: int, shape: CallShape, capture: Capture | None
    ) -> None:
        super().__init__(watch, number)
        self.shape = shape
        self.capture = capture
        self.input_norms: Tensor | None = None
        self.entry_norms: Tensor | None = None
        self.end_norms: list[Tensor | None] = [None, None]
        self.floor = 0.0

    @property
    def exact(self) -> bool:
        """Whether the exact measurement was on."""
        return self.capture is not None

    def forget(self) -> None:
        """Let go of all copies, as the graph may live on."""
        self.capture = None

    def input_arrived(self, grad: Tensor) -> None:
        """The gradient of the input."""
        if self._keep():
            self.floor = _floor(grad)
            self.input_norms = _joined(self.input_norms, self._norms(grad))

    def output_arrived(self, grad: Tensor) -> None:
        """The gradient that the output has directly from what comes after the module."""
        if self._keep():
            self.entry_norms = _joined(self.entry_norms, self._norms(grad))
            if self.capture is not None and not self.capture.refusal:
                self.capture.add_output(grad)

    def hidden_arrived(self, grad: Tensor) -> None:
        """The gradient of h_n."""
        self._state_arrived(0, grad)

    def cell_arrived(self, grad: Tensor) -> None:
        """The gradient of c_n."""
        self._state_arrived(1, grad)

    def _state_arrived(self, which: int, grad: Tensor) -> None:
        if self._keep():
            self.end_norms[which] = _joined(self.end_norms[which], feature_norms(grad, fast=True))
            if self.capture is not None and not self.capture.refusal:
                self.capture.add_state(which, grad)

    def _norms(self, grad: Tensor) -> Tensor:
        return self.shape.thinned(feature_norms(grad, fast=True))


def _floor(grad: Tensor) -> float:
    width = grad.shape[-1]
    floor = float_floor(grad.dtype, width)
    return floor if grad.dtype is torch.float64 else max(floor, FAST_FLOOR * math.sqrt(width))


def _joined(before: Tensor | None, norms: Tensor) -> Tensor:
    """Of a second backward through the same graph only the norms of both parts are known."""
    return norms if before is None else torch.hypot(before, norms)


class RecurrentWatch(CallWatch[RecurrentModule, RecurrentCall]):
    """Sees the calls of one fused recurrent module; see :class:`CallWatch`.

    Attributes:
        single_steps: How many calls since the last measurement were of a single timestep.
    """

    def __init__(self, name: str, module: RecurrentModule, switch: Switch) -> None:
        super().__init__(name, module, switch)
        self.single_steps = 0
        self._live: weakref.WeakSet[RecurrentCall] = weakref.WeakSet()

    def forget(self) -> None:
        """Begin a new measurement."""
        super().forget()
        self.single_steps = 0
        self._live = weakref.WeakSet()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See the input, and let the module have a view of it."""
        self._begun.call = None
        value: Any = args[0] if args else kwargs.get("input")
        data = value.data if isinstance(value, PackedSequence) else value
        if not is_plain(data):
            return None
        shape = CallShape.of(value, batch_first=self.module.batch_first)
        if shape is None or not shape.timesteps or not shape.sequences:
            return None
        self.seen = True
        if shape.timesteps == 1:
            self.single_steps += 1
            return None
        if not (data.requires_grad or trains(module)):
            return None
        hx = args[1] if len(args) > 1 else kwargs.get("hx")
        call = self._begin(shape, data, hx)
        # Also what is not kept is tapped: a checkpoint's second forward must save the same tensors
        # as the first, so whether the input is tapped must not depend on the calls before.
        arrived = _ignore if call is None else call.input_arrived
        tapped = _with_data(value, tap(data, arrived, self._switch))
        return ((tapped, *args[1:]), kwargs) if args else (args, {**kwargs, "input": tapped})

    def _begin(self, shape: CallShape, data: Tensor, hx: object) -> RecurrentCall | None:
        """The call that begins, or ``None`` if enough others are kept."""
        if len(self._live) >= MOST_CALLS:
            return None
        call = self._new_call(shape, data, hx)
        self._number += 1
        self._live.add(call)
        self._begun.call = call
        return call

    def _new_call(self, shape: CallShape, data: Tensor, hx: object) -> RecurrentCall:
        capture = Capture(self.module, shape, data, hx) if self._switch.exact else None
        return RecurrentCall(self, self._number, shape, capture)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """See the output and the last states."""
        call = self._take_begun()
        if call is None or not isinstance(output, tuple) or len(output) != 2:
            return
        value, states = output
        data = value.data if isinstance(value, PackedSequence) else value
        listen(data, call.output_arrived, self._switch)
        hidden, cell = states if isinstance(states, tuple) else (states, None)
        listen(hidden, call.hidden_arrived, self._switch)
        listen(cell, call.cell_arrived, self._switch)
        capture = call.capture
        if capture is not None and not capture.refusal and is_plain(data):
            capture.output = capture.rows.data(data)


def _ignore(_: Tensor) -> None:
    """Nothing is kept of a gradient."""


def _with_data(value: Sequences, data: Tensor) -> Sequences:
    if isinstance(value, PackedSequence):
        return PackedSequence(data, value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    return data
