"""Recurrent layers with a second connection through time.

Shape suffixes: ``B`` batch, ``H`` hidden, ``G`` all gates together, ``K`` layers times directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_gradguard._validation import check_choice, check_number
from lightning_gradguard.nn._scan import Cell, States
from lightning_gradguard.nn._sequences import Layout, read_state
from lightning_gradguard.nn.equations import ElmanCell, GateWeights, GRUCell, LSTMCell
from lightning_gradguard.nn.stack import RecurrentStack, State

CellName = Literal["rnn", "gru", "lstm"]
Nonlinearity = Literal["tanh", "relu"]
_GATES = {"rnn": 1, "gru": 3, "lstm": 4}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


class TemporalSkipRNN(RecurrentStack):
    """Recurrent layers whose state depends on the one before and on that ``skip`` timesteps ago.

    ``cell="rnn"``, with the nonlinearity for tanh:

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh + W_sh h_{t-k})

    ``cell="gru"`` and ``cell="lstm"``: as in :class:`torch.nn.GRU` and :class:`torch.nn.LSTM`, with
    W_hh h_{t-1} + W_sh h_{t-k} in place of W_hh h_{t-1} in every gate, of a GRU

        n_t = tanh(W_in x_t + b_in + r_t (W_hn h_{t-1} + W_sn h_{t-k} + b_hn))
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    and the c of an LSTM has no skip. States before the first timestep are zero.

    The shortest way over T timesteps is T / k applications long instead of T. Such delays are those
    of Lin et al. 1996, "Learning long-term dependencies in NARX recurrent neural networks", there
    of the output. Zhang et al. 2016, "Architectural complexity measures of recurrent neural
    networks", measure by the recurrent skip coefficient how fast information travels so.

    Constructor, shapes, ``PackedSequence``, unbatched input, return values, gate order and names of
    the parameters are those of torch, and there is ``weight_sh_l0``, … ``(G, H)``. But ``h_n`` has
    the last k states, ``(K·k, B, H)``: layer by layer, in a layer the reverse direction after the
    forward one, and for each oldest first, so that ``h_n[-1]`` is the last state of the last one.
    ``c_n`` is ``(K, B, H)``, as usual.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether the gates have biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        cell: ``"rnn"`` (default), ``"gru"`` or ``"lstm"``.
        skip: k, at least 2.
        nonlinearity: ``"tanh"`` (default) or ``"relu"``, of an ``"rnn"`` only.
        residual: Whether the input of each layer but the first is added to its output. Default
            ``False``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> rnn = TemporalSkipRNN(3, 5, skip=4)
        >>> output, h_n = rnn(torch.randn(20, 2, 3))
        >>> output.shape, h_n.shape
        (torch.Size([20, 2, 5]), torch.Size([4, 2, 5]))
        >>> torch.equal(h_n, output[-4:])
        True
        >>> more, h_n = rnn(torch.randn(7, 2, 3), h_n)  # goes on where the first 20 ended
    """

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
        skip: int,
        cell: CellName = "rnn",
        nonlinearity: Nonlinearity = "tanh",
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number("skip", skip, at_least=2, integer=True)
        check_choice("cell", cell, get_args(CellName))
        check_choice("nonlinearity", nonlinearity, get_args(Nonlinearity))
        if cell != "rnn" and nonlinearity != "tanh":
            raise ValueError(
                f"nonlinearity must be left out with cell={cell!r}, got {nonlinearity!r}"
            )
        # Before what they shape; modules take plain values before their constructor has run.
        self.cell, self.skip, self.nonlinearity = cell, skip, nonlinearity
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            residual=residual, device=device, dtype=dtype,
        )  # fmt: skip

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        gates = _GATES[self.cell]
        shapes = GateWeights.shapes(gates, features, self.hidden_size, bias=self.bias)
        return {**shapes, "weight_sh": (gates * self.hidden_size, self.hidden_size)}

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        given = GateWeights.of(weights)
        both = replace(given, weight_hh=torch.cat((given.weight_hh, weights["weight_sh"]), 1))
        if self.cell == "gru":
            return _SkipGRUCell(both, self.skip)
        if self.cell == "lstm":
            return _SkipCell(LSTMCell(both), self.skip)
        return _SkipCell(ElmanCell(both, _ACTIVATIONS[self.nonlinearity]), self.skip)

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        """Of the last k hidden states, newest first, and of c."""
        return (self.hidden_size,) * (self.skip + (self.cell == "lstm"))

    def _given_states(self, hx: State | None, layout: Layout, x: Tensor) -> list[States]:
        if hx is None:
            return super()._given_states(None, layout, x)
        given: tuple[Tensor, ...] = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        labels = ["hidden[0]", "hidden[1]"] if self.cell == "lstm" else ["hidden"]
        if len(given) != len(labels):
            names = "h and c" if self.cell == "lstm" else "h"
            raise RuntimeError(f"Expected hx to be {names}, got {len(given)} tensors")
        parts, size = self.num_layers * self._directions, (layout.batch, self.hidden_size)
        h = read_state(given[0], (parts * self.skip, *size), layout, labels[0])
        states: list[States] = [tuple(reversed(b.unbind(0))) for b in h.split(self.skip)]
        if self.cell == "lstm":
            c = read_state(given[1], (parts, *size), layout, labels[1])
            states = [(*hidden, cell) for hidden, cell in zip(states, c.unbind(0), strict=True)]
        return states

    def _returned(self, last: Sequence[Tensor]) -> State:
        h = torch.stack(tuple(reversed(last[: self.skip])), 1).flatten(0, 1)
        return (h, last[-1]) if self.cell == "lstm" else h

    def _own_defaults(self) -> dict[str, object]:
        return {"skip": None, "cell": "rnn", "nonlinearity": "tanh"}


@dataclass(frozen=True, eq=False)
class _SkipCell(Cell):
    """A cell that sees h_{t-1} and h_{t-k} side by side; h_{t-1}, …, h_{t-k} are its state.

    Attributes:
        cell: Needs h for nothing but its product with ``weight_hh``, ``(G, 2H)``.
        skip: k.
    """

    cell: Cell
    skip: int

    @property
    def computed(self) -> frozenset[int]:  # type: ignore[override]
        """See :class:`Cell`: h and, of an LSTM, c."""
        return frozenset((0, self.skip))

    def project(self, x: Tensor) -> States:
        """See :class:`Cell`."""
        return self.cell.project(x)

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        seen_B2H = torch.cat((states[0], states[self.skip - 1]), 1)
        h_BH, *rest = self.cell.step(number, projected, (seen_B2H, *states[self.skip :]))
        return (h_BH, *states[: self.skip - 1], *rest)


@dataclass(frozen=True, eq=False)
class _SkipGRUCell(GRUCell):
    """The same of a GRU, which needs h_{t-1} for more than that."""

    skip: int = 2
    computed = frozenset((0,))

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        h_BH, w = states[0], self.weights
        seen_B2H = torch.cat((h_BH, states[self.skip - 1]), 1)
        recurrent_BG = torch.nn.functional.linear(seen_B2H, w.weight_hh, w.bias_hh)
        r_in, z_in, n_in = projected[0].chunk(3, 1)
        r_h, z_h, n_h = recurrent_BG.chunk(3, 1)
        r, z = torch.sigmoid(r_in + r_h), torch.sigmoid(z_in + z_h)
        n = torch.tanh(n_in + r * n_h)
        return (n + z * (h_BH - n), *states[: self.skip - 1])
