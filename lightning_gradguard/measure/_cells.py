"""Recurrent cells that the user's own loop calls, one timestep each: what each call leaves behind.

Shape suffixes: ``B`` batch, ``H`` hidden, ``I`` input; ``R`` some of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.measure._capture import MOST_SEQUENCES
from lightning_gradguard.measure._cell_links import find_call, is_made_of, mark, origin_of
from lightning_gradguard.measure._taps import (
    Switch,
    feature_norms,
    is_plain,
    listen,
    tap,
)
from lightning_gradguard.measure._watch import CallWatch, WatchedCall

Cell = nn.RNNCell | nn.LSTMCell | nn.GRUCell

# States that are kept of one cell in a step, and calls: of those beyond only norms are known.
_MOST_STATES = 2**22
_MOST_CALLS = 2**14


class CellCall(WatchedCall):
    """One call of a cell.

    Attributes:
        before: Number of the call that returned its state; ``None`` where a sequence begins.
        root: Number of the call with which its sequence begins.
        altered: Whether a state of this sequence was not given as the call before returned it.
        fed_back: Whether an input of this sequence comes from one of its own states.
        dtype: In which the call was computed.
        x_RI: What it was given; ``None`` if too much was kept before.
        states_RH: The states that it was given, h or (h, c); empty for none.
        returned_RH: The states that it returned.
        through_hidden: Whether the gradient of c includes what comes through h: not if a kernel
            has made both.
        grads_RH: Their gradients, by their position.
        returned_norms: (B,) norms of those, for the whole batch.
        input_norms: (B,) norm of the gradient of its input.
    """

    def __init__(
        self, watch: CellWatch, number: int, x_BI: Tensor, states_BH: tuple[Tensor, ...]
    ) -> None:
        super().__init__(watch, number)
        origin, altered = origin_of(watch, states_BH)
        self.before = None if origin is None else origin.number
        self.root: int = number if origin is None else origin.root
        self.altered: bool = altered or (origin is not None and origin.altered)
        self.fed_back: bool = origin is not None and (
            origin.fed_back or find_call(watch, x_BI, self.root) is not None
        )
        device = x_BI.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else x_BI.dtype
        # The same sequences as before, also where the batch shrinks as sequences end.
        size = x_BI.shape[0] if x_BI.dim() == 2 else 1
        same = origin is not None and not altered
        self.stride: int = origin.stride if same and origin else -(-size // MOST_SEQUENCES)
        self.x_RI: Tensor | None = None
        self.states_RH: tuple[Tensor, ...] = ()
        self.returned_RH: tuple[Tensor, ...] = ()
        self.through_hidden = False
        self.grads_RH: dict[int, Tensor] = {}
        self.returned_norms: dict[int, Tensor] = {}
        self.input_norms: Tensor | None = None
        if watch.has_room(size):
            self.x_RI = self._rows(x_BI)
            known = origin.returned_RH if same and origin else ()
            all_here = bool(known) and len(known[0]) == len(self.x_RI)
            self.states_RH = known if all_here else tuple(map(self._rows, states_BH))

    def returns(self, *states_BH: Tensor) -> None:
        """Take in what the call returned, and mark it as that."""
        for which, state_BH in enumerate(states_BH):
            mark(self._watch, self, which, state_BH)
        if len(states_BH) == 2:
            self.through_hidden = is_made_of(*states_BH)
        if self.x_RI is not None:
            self.returned_RH = tuple(map(self._rows, states_BH))

    def forget(self) -> None:
        """Let go of all copies, as the graph may live on."""
        self.x_RI, self.states_RH, self.returned_RH, self.grads_RH = None, (), (), {}

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
            if self.x_RI is not None:
                rows, before = self._rows(grad), self.grads_RH.get(which)
                self.grads_RH[which] = rows if before is None else before + rows

    def _rows(self, value: Tensor) -> Tensor:
        value = value.detach()
        rows = value.unsqueeze(0) if value.dim() == 1 else value[:: max(1, self.stride)]
        return rows.clone(memory_format=torch.contiguous_format)


def _joined(before_B: Tensor | None, grad: Tensor) -> Tensor:
    norms_B = feature_norms(grad).reshape(-1)
    return norms_B if before_B is None else torch.hypot(before_B, norms_B)


class CellWatch(CallWatch[Cell, CellCall]):
    """Sees the calls of one cell, when the exact measurement is on; see :class:`CallWatch`.

    Attributes:
        versions: Of the weights in the first of these forward passes.
    """

    def __init__(self, name: str, module: Cell, switch: Switch) -> None:
        super().__init__(name, module, switch)
        self.versions: list[int] = []

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See the input and the state, and let the cell have a view of the input."""
        self.seen = True
        self._begun.call = None
        value = args[0] if args else kwargs.get("input")
        hx = args[1] if len(args) > 1 else kwargs.get("hx")
        states = hx if isinstance(hx, tuple) else () if hx is None else (hx,)
        if not self._switch.exact or not is_plain(value) or not all(map(is_plain, states)):
            return None
        if self._number == 0:
            self.versions = weight_versions(self.module)
        call = self._begun.call = CellCall(self, self._number, value, states)
        self._number += 1
        tapped = tap(value, call.input_arrived, self._switch)
        return ((tapped, *args[1:]), kwargs) if args else (args, {**kwargs, "input": tapped})

    def has_room(self, sequences: int) -> bool:
        """Whether one more call of that many sequences can be kept."""
        size = min(MOST_SEQUENCES, sequences) * self.module.hidden_size
        return self._number < min(_MOST_CALLS, _MOST_STATES // max(1, size))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """See the state that the cell returns."""
        call = self._take_begun()
        if call is None:
            return
        states = output if isinstance(output, tuple) else (output,)
        if len(states) > 2 or not all(map(is_plain, states)):
            return
        call.returns(*states)
        hidden, state = states if len(states) == 2 else (output, None)
        listen(hidden, call.hidden_arrived, self._switch)
        listen(state, call.cell_arrived, self._switch)


def weight_versions(cell: nn.Module) -> list[int]:
    """Changes with every change of a weight in place."""
    return [parameter._version for parameter in cell.parameters()]  # noqa: SLF001
