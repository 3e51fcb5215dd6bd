"""Layers and directions of a recurrent module, one after the other.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``K`` layers times directions, ``H`` hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_gradguard.nn._scan import Cell, States, Trace, scan
from lightning_gradguard.nn._sequences import Input, Layout, read_input, read_state

State = Tensor | tuple[Tensor, ...]


class Layers(nn.Module):
    """Runs layers and directions as torch's own recurrent modules do, timestep by timestep.

    A subclass has the attributes below, the parameters, and the equations.
    """

    # What the state is made of: the hidden state, and what else is carried from step to step.
    state_names: ClassVar[tuple[str, ...]] = ("h",)

    input_size: int
    hidden_size: int
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    residual: bool
    recording: Trace | None

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        """Features of each tensor of the state."""
        return (self.hidden_size,) * len(self.state_names)

    @abstractmethod
    def _weights(self, part: int) -> dict[str, Tensor]:
        """Parameters of one layer and direction by the name that they have in each."""

    @abstractmethod
    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        """The equations of one layer and direction, counted by ``part``."""

    def forward(
        self,
        input: Input,  # noqa: A002 - as torch's own modules call it
        hx: State | None = None,
    ) -> tuple[Input, State]:
        """Run all layers.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` if ``batch_first``, ``(T, I)``, or packed.
            hx: The state to begin with, as this returns it. Default zero.

        Returns:
            The output, ``(T, B, H)`` in the layout of the input (2H if bidirectional), and the
            state after the last timestep, ``(K, B, H)`` each.

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
        output, ends = self._run(x, states, layout.batch_sizes, trace)
        if trace is not None:
            output, ends = trace.returns(output, ends)
        last = [layout.state(torch.stack(parts)) for parts in zip(*ends, strict=True)]
        return layout.output(output), self._returned(last)

    def _returned(self, last: Sequence[Tensor]) -> State:
        return last[0] if len(last) == 1 else tuple(last)

    def _run(
        self,
        x: Tensor,
        states: Sequence[States],
        batch_sizes: list[int] | None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, list[States]]:
        """All layers, over ``(T, B, I)`` or packed data, from one state for each part."""
        ends: list[States] = []
        for layer in range(self.num_layers):
            output, more = self._layer(layer, x, states[len(ends) :], batch_sizes, trace)
            ends += more
            x = self._between(x, output, layer)
        return x, ends

    def _layer(
        self,
        layer: int,
        x: Tensor,
        states: Sequence[States],
        batch_sizes: list[int] | None,
        trace: Trace | None,
    ) -> tuple[Tensor, list[States]]:
        """All directions of a layer; the first of ``states`` are its own."""
        outputs: list[Tensor] = []
        ends: list[States] = []
        for way in range(self._directions):
            part = layer * self._directions + way
            output, end = scan(
                self._cell(self._weights(part), part), x, states[way], batch_sizes,
                reverse=way == 1, trace=trace, part=part,
            )  # fmt: skip
            outputs.append(output)
            ends.append(end)
        return torch.cat(outputs, -1) if self.bidirectional else outputs[0], ends

    def _between(self, x: Tensor, output: Tensor, layer: int) -> Tensor:
        """What comes out of a layer, given what went into it."""
        if self.residual and layer > 0:
            output = output + x
        if layer < self.num_layers - 1 and self.dropout:
            output = nn.functional.dropout(output, self.dropout, self.training)
        return output

    def _given_states(self, hx: State | None, layout: Layout, x: Tensor) -> list[States]:
        """The state of each part before the first timestep."""
        parts = self.num_layers * self._directions
        sizes = self._state_sizes
        count = len(sizes)
        if hx is None:
            return [tuple(x.new_zeros(layout.batch, size) for size in sizes)] * parts
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != count:
            raise RuntimeError(
                f"Expected hx to be {' and '.join(self.state_names)}, got {len(given)} tensors"
            )
        labels = ["hidden"] if count == 1 else [f"hidden[{n}]" for n in range(count)]
        states = [
            read_state(state, (parts, layout.batch, size), layout, label)
            for state, size, label in zip(given, sizes, labels, strict=True)
        ]
        return list(zip(*(state.unbind(0) for state in states), strict=True))
