"""Stacks of recurrent layers that update their state at some timesteps and copy it at the others.

Shape suffixes: ``T`` time, ``B`` batch, ``K`` layers times directions, ``G`` gates, ``H`` hidden.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.nn._scan import Cell, States, Trace, scan
from lightning_gradguard.nn._sequences import Input, Layout, read_input, read_state
from lightning_gradguard.nn._skip_budget import Gates
from lightning_gradguard.nn._skip_cell import SkipCell
from lightning_gradguard.nn._skip_state import SkipLSTMState
from lightning_gradguard.nn.equations import GateWeights
from lightning_gradguard.nn.stack import RecurrentStack, State


class SkipStack(RecurrentStack):
    """Recurrent layers whose state is updated at some timesteps and copied at the others.

    Campos et al., ICLR 2018, "Skip RNN: learning to skip state updates in recurrent neural
    networks". With s the state and S the equations of the layers,

        u_t = round(ũ_t)                                       0.5 is rounded up
        s_t = u_t S(s_{t−1}, x_t) + (1 − u_t) s_{t−1}
        Δũ_t = σ(W_p s_t + b_p)
        ũ_{t+1} = u_t Δũ_t + (1 − u_t) (ũ_t + min(Δũ_t, 1 − ũ_t))

    and ũ = 1 at the first timestep. The gradient of round is taken to be 1 (straight-through). A
    copied state passes its gradient on unchanged, so that T timesteps with n updates are n
    applications of S. With :func:`skip_budget_loss` the module learns to do with few. Dense code as
    this saves no time by it: :func:`update_share` tells what there would be to save.

    **Gates.** With ``share_gate`` a stack is one S: its layers are updated or copied together, by
    u_t from the state of the top layer; what goes from layer to layer within a timestep are the
    candidates. In two directions no layer can begin before the one below it is through the whole
    sequence, so that there can be no such gate. Without it each layer and direction has a gate.

    **The state** also holds ũ of the next timestep, so that a sequence can be run in chunks:
    ``output, state = skip(x, state)``. Δũ needs no place in it: it has gone into ũ already. Where
    ``hx`` has no ũ the gate begins with an update, ũ = 1.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether S has biases; the update gate always has one. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        share_gate: Whether all layers share the gate of the top layer. Default ``True``, as in the
            paper.
        update_bias: b_p at first. Default 1, as in the paper: Δũ is about 0.73, so that every
            timestep is an update until the module learns otherwise.
        learn_initial_state: Whether the first state is a parameter, zero at first, instead of zero.
            Default ``False``.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        recording: Where the next forward pass notes its states, once; ``None`` for nowhere. The
            last tensor of each state is ũ. Layers that share a gate are one part, number 0, see
            :class:`~lightning_gradguard.nn._skip_cell.SkipCell`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or ``share_gate`` is asked for in several
            layers with two directions.
    """

    _gate_count: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        share_gate: bool = True,
        update_bias: float = 1.0,
        learn_initial_state: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_type("share_gate", share_gate, bool, "a bool")
        check_number("update_bias", update_bias, above=-math.inf, below=math.inf)
        check_type("learn_initial_state", learn_initial_state, bool, "a bool")
        self.share_gate, self.update_bias = share_gate, update_bias
        self.learn_initial_state = learn_initial_state
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        if share_gate and bidirectional and num_layers > 1:
            raise ValueError(
                "share_gate must be False with bidirectional=True and num_layers > 1, where a "
                "layer needs all timesteps of the one below it, "
                f"got share_gate={share_gate!r} with num_layers={num_layers!r}"
            )

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        H = self.hidden_size
        shapes = GateWeights.shapes(self._gate_count, features, H, bias=self.bias)
        layer = len(self._names) // self._directions  # of the parameters that are made now
        if layer == self.num_layers - 1 or not self.share_gate:
            shapes |= {"weight_update": (1, H), "bias_update": (1,)}
        if self.learn_initial_state:
            shapes |= {f"initial_{name}": (H,) for name in self.state_names[:-1]}
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew as torch does; set the biases of gates, and the initial state."""
        super().reset_parameters()
        for names in self._names:
            for name, full in names.items():
                if name == "bias_update":
                    nn.init.constant_(getattr(self, full), self.update_bias)
                elif name.startswith("initial"):
                    nn.init.zeros_(getattr(self, full))
        if self.bias:
            self._set_gate_biases()

    @abstractmethod
    def _set_gate_biases(self) -> None:
        """As in the paper."""

    @abstractmethod
    def _state(self, own: Sequence[Tensor], gate: Tensor) -> State:
        """What :meth:`forward` returns."""

    @overload
    def forward(
        self,
        input: Input,
        hx: State | None = None,
        return_gates: Literal[False] = False,
    ) -> tuple[Input, State]: ...

    @overload
    def forward(
        self,
        input: Input,
        hx: State | None = None,
        *,
        return_gates: Literal[True],
    ) -> tuple[Input, State, Gates]: ...

    @overload
    def forward(
        self,
        input: Input,
        hx: State | None,
        return_gates: bool,
    ) -> tuple[Input, State] | tuple[Input, State, Gates]: ...

    def forward(
        self,
        input: Input,  # noqa: A002 - as torch's own modules call it
        hx: State | None = None,
        return_gates: bool = False,
    ) -> tuple[Input, State] | tuple[Input, State, Gates]:
        """Run all layers.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` if ``batch_first``, ``(T, I)``, or packed.
            hx: The state to begin with, as this returns it or as torch's own module does. Default
                zero, or the learned one.
            return_gates: Whether to return the gates too. Default ``False``.

        Returns:
            The output, ``(T, B, H)`` in the layout of the input (2H if bidirectional), and the
            state after the last timestep: ``(K, B, H)`` each, and ũ, ``(G, B, 1)``. With
            ``return_gates`` also u_t, ``(T, B)`` in the layout of the input; if there are several
            gates, a tuple of them: l0, l0_reverse, l1, …

        Raises:
            RuntimeError: If a shape does not fit.
            ValueError: If the number of dimensions or the dtype does not fit.
        """
        weight = next(self.parameters())
        x, layout = read_input(
            type(self).__name__, input, self.input_size, weight, batch_first=self.batch_first
        )
        states = self._given_states(hx, layout, x)
        trace, self.recording = self.recording, None
        output, ends, gates = self._run_gated(x, states, layout.batch_sizes, trace)
        if trace is not None:
            output, (*ends, gates) = trace.returns(output, [*ends, gates])
        state = self._last_state(ends, layout)
        if not return_gates:
            return layout.output(output), state
        used = tuple(layout.output(gate) for gate in gates)
        return layout.output(output), state, used if len(used) > 1 else used[0]

    @property
    def _together(self) -> list[range]:
        """The layers that share a gate, from the bottom up."""
        if self.share_gate:
            return [range(self.num_layers)]
        return [range(layer, layer + 1) for layer in range(self.num_layers)]

    def _run_gated(
        self,
        x: Tensor,
        states: Sequence[States],
        batch_sizes: list[int] | None,
        trace: Trace | None,
    ) -> tuple[Tensor, list[States], States]:
        """All layers, from one state for each gate; also returns the gates."""
        ends: list[States] = []
        gates: list[Tensor] = []
        for layers in self._together:
            outputs: list[Tensor] = []
            for way in range(self._directions):
                cell = self._skip_cell([layer * self._directions + way for layer in layers])
                number = len(ends)
                output, end = scan(
                    cell, x, states[number], batch_sizes, reverse=way == 1, trace=trace, part=number
                )
                outputs.append(output)
                ends.append(end)
                gates.append(cell.gates(batch_sizes, reverse=way == 1))
            output = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            x = self._between(x, output, layers[-1])
        return x, ends, tuple(gates)

    def _skip_cell(self, parts: Sequence[int]) -> SkipCell:
        weights = [self._weights(part) for part in parts]
        cells: tuple[Cell, ...] = tuple(map(self._cell, weights, parts))
        dropout = self.dropout if self.training else 0.0
        return SkipCell(cells, weights[-1]["weight_update"], weights[-1]["bias_update"], dropout)

    def _given_states(self, hx: State | None, layout: Layout, x: Tensor) -> list[States]:
        """The state of each gate's cell before the first timestep."""
        gates = len(self._together) * self._directions
        own, gate = self._initial(layout, x) if hx is None else self._read(hx, gates, layout)
        if gate is None:
            gate = x.new_ones(gates, layout.batch, 1)
        # Many small increments add up in ũ: in half precision they would be rounded away.
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        if self.share_gate and self.num_layers > 1:
            return [(*(state for states in reversed(own) for state in states), gate[0])]
        return [(*states, last) for states, last in zip(own, gate.unbind(0), strict=True)]

    def _initial(self, layout: Layout, x: Tensor) -> tuple[list[States], None]:
        shape = (layout.batch, self.hidden_size)
        names = self.state_names[:-1]
        parts = range(self.num_layers * self._directions)
        if not self.learn_initial_state:
            return [(x.new_zeros(shape),) * len(names) for _ in parts], None
        learned = [self._weights(part) for part in parts]
        return [tuple(w[f"initial_{n}"].expand(shape) for n in names) for w in learned], None

    def _read(self, hx: State, gates: int, layout: Layout) -> tuple[list[States], Tensor | None]:
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        gate = hx.gate if isinstance(hx, SkipLSTMState) else None
        own, names = len(self.state_names) - 1, self.state_names
        if len(given) == own + 1:
            *given_own, gate = given
        elif len(given) == own:
            given_own = list(given)
        else:
            raise RuntimeError(
                f"Expected hx to be {' and '.join(names[:-1])}, with or without {names[-1]}, "
                f"got {len(given)} tensors"
            )
        shape = (self.num_layers * self._directions, layout.batch, self.hidden_size)
        labels = ["hidden"] if own == 1 else [f"hidden[{n}]" for n in range(own)]
        states = [read_state(s, shape, layout, n) for s, n in zip(given_own, labels, strict=True)]
        if gate is not None:
            gate = read_state(gate, (gates, layout.batch, 1), layout, "gate")
        return list(zip(*(state.unbind(0) for state in states), strict=True)), gate

    def _last_state(self, ends: Sequence[States], layout: Layout) -> State:
        parts: list[States] = [end[:-1] for end in ends]
        if self.share_gate and self.num_layers > 1:
            (end,) = parts
            size = len(self.state_names) - 1
            parts = [end[i : i + size] for i in range(len(end) - size, -1, -size)]
        own = [layout.state(torch.stack(states)) for states in zip(*parts, strict=True)]
        return self._state(own, layout.state(torch.stack([end[-1] for end in ends])))

    def _own_defaults(self) -> dict[str, object]:
        return {"share_gate": True, "update_bias": 1.0, "learn_initial_state": False}
