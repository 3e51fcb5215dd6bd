"""Recurrent cells that the user's own loop calls, one timestep each: what each call leaves behind.

Shape suffixes: ``B`` batch, ``H`` hidden, ``I`` input; ``R`` some of the batch.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.measure._capture import MOST_SEQUENCES
from lightning_gradguard.measure._taps import (
    Switch,
    attach,
    feature_norms,
    is_plain,
    listen,
    tap,
)

Cell = nn.RNNCell | nn.LSTMCell | nn.GRUCell

# States that are kept of one cell in a step, and sequences: calls beyond that are left out.
_MOST_STATES = 2**22
_MOST_CALLS = 2**14


class CellCall:
    """One call of a cell.

    Attributes:
        number: Which call since the last measurement it is.
        starts: Whether it begins a sequence: its state is not that of an earlier call.
        x_RI: What it was given.
        states_RH: The states that it was given, h or (h, c); empty for none.
        grads_RH: The gradients of the states that it returned, by their position.
        returned_norms: (B,) norms of those, for the whole batch.
        input_norms: (B,) norm of the gradient of its input.
    """

    def __init__(
        self, watch: CellWatch, number: int, x_BI: Tensor, states_BH: tuple[Tensor, ...]
    ) -> None:
        self._watch = watch
        self._generation = watch.generation
        self._kept = False
        self.number = number
        self.starts = all(state.is_leaf or not state.requires_grad for state in states_BH)
        self.stride = -(-x_BI.shape[0] // MOST_SEQUENCES) if x_BI.dim() == 2 else 1
        self.x_RI = self._rows(x_BI)
        self.states_RH = tuple(map(self._rows, states_BH))
        self.grads_RH: dict[int, Tensor] = {}
        self.returned_norms: dict[int, Tensor] = {}
        self.input_norms: Tensor | None = None

    def input_arrived(self, grad: Tensor) -> None:
        """The gradient of the input."""
        if self._keep():
            self.input_norms = _joined(self.input_norms, grad)

    def hidden_arrived(self, grad: Tensor) -> None:
        """The gradient of the hidden state that it returned."""
        self._returned(0, grad)

    def cell_arrived(self, grad: Tensor) -> None:
        """The gradient of the cell state that it returned."""
        self._returned(1, grad)

    def _returned(self, which: int, grad: Tensor) -> None:
        if self._keep():
            self.returned_norms[which] = _joined(self.returned_norms.get(which), grad)
            rows, before = self._rows(grad), self.grads_RH.get(which)
            self.grads_RH[which] = rows if before is None else before + rows

    def _rows(self, value: Tensor) -> Tensor:
        value = value.detach()
        rows = value.unsqueeze(0) if value.dim() == 1 else value[:: self.stride]
        return rows.clone(memory_format=torch.contiguous_format)

    def _keep(self) -> bool:
        """Belong to the measurement from the first gradient on, unless that is over."""
        if self._generation != self._watch.generation:
            return False
        if not self._kept:
            self._kept = True
            self._watch.calls.append(self)
        return True


def _joined(before_B: Tensor | None, grad: Tensor) -> Tensor:
    norms_B = feature_norms(grad).reshape(-1)
    return norms_B if before_B is None else torch.hypot(before_B, norms_B)


class CellWatch:
    """Sees the calls of one cell, when the exact measurement is on.

    Args:
        name: Path of the module.
        cell: The module.
        switch: Of the probe.

    Attributes:
        calls: Those that a gradient has reached since the last measurement.
        versions: Of the weights in the first of these forward passes.
        seen: Whether there ever was a call in training.
        reason: Why it cannot be watched, if that has shown; else empty.
        generation: Number of measurements; graphs from before the last one are over.
    """

    reason = ""

    def __init__(self, name: str, cell: Cell, switch: Switch) -> None:
        self.name = name
        self.cell = cell
        self.calls: list[CellCall] = []
        self.versions: list[int] = []
        self.seen = False
        self.generation = 0
        self._switch = switch
        self._number = 0
        self._begun = threading.local()  # nn.DataParallel calls one module in several threads
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Begin to see calls."""
        self._handles = attach(self.cell, self._switch, before=self.before, after=self.after)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Begin a new measurement."""
        for call in self.calls:
            call.states_RH, call.grads_RH = (), {}  # the graph may live on without them
        self.calls = []
        self.generation += 1
        self._number = 0

    def before(
        self, cell: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See the input and the state, and let the cell have a view of the input."""
        self.seen = True
        self._begun.call = None
        named = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        value, hx = named.get("input"), named.get("hx")
        states = hx if isinstance(hx, tuple) else () if hx is None else (hx,)
        if not self._switch.exact or not is_plain(value) or not all(map(is_plain, states)):
            return None
        size = min(MOST_SEQUENCES, value.shape[0] if value.dim() == 2 else 1)
        most = min(_MOST_CALLS, _MOST_STATES // max(1, size * self.cell.hidden_size))
        if self._number >= most:
            return None
        if self._number == 0:
            self.versions = weight_versions(self.cell)
        call = self._begun.call = CellCall(self, self._number, value, states)
        self._number += 1
        return (), {**named, "input": tap(value, call.input_arrived, self._switch)}

    def after(self, cell: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """See the state that the cell returns."""
        call: CellCall | None = getattr(self._begun, "call", None)
        self._begun.call = None
        if call is None:
            return
        hidden, state = output if isinstance(output, tuple) else (output, None)
        listen(hidden, call.hidden_arrived, self._switch)
        listen(state, call.cell_arrived, self._switch)


def weight_versions(cell: nn.Module) -> list[int]:
    """Changes with every change of a weight in place."""
    return [parameter._version for parameter in cell.parameters()]  # noqa: SLF001
