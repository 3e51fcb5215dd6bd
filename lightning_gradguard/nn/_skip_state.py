"""What Skip RNNs carry from one chunk of a sequence to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class SkipLSTMState(tuple[Tensor, ...]):
    """``(h_n, c_n)`` as of :class:`torch.nn.LSTM`, with ũ of the next timestep in ``gate``.

    It unpacks into two tensors, so that code for ``nn.LSTM`` runs as it is. A tuple that is made of
    them is not a state with a gate any more, but a plain tuple, also where this class is called
    without a gate, as by what rebuilds any nesting of tensors: the gate then begins anew, with an
    update. Detach the state by its own method, or go on with the plain tuple
    ``(h_n, c_n, state.gate)``.

    Args:
        states: h_n and c_n, ``(K, B, H)``.
        gate: ũ, ``(G, B, 1)`` for G gates, in at least float32.

    Example:
        >>> import torch
        >>> h, c, gate = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 2, 1)
        >>> h_n, c_n = state = SkipLSTMState((h, c), gate)
        >>> bool(state.detach().gate.all())
        True
    """

    gate: Tensor

    def __new__(cls, states: Iterable[Tensor], gate: Tensor | None = None) -> SkipLSTMState:
        """See the class."""
        if gate is None:
            return tuple(states)  # type: ignore[return-value]
        state = super().__new__(cls, states)
        state.gate = gate
        return state

    def __getnewargs__(self) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(self), self.gate

    def detach(self) -> SkipLSTMState:
        """The same state, through which no gradient goes back."""
        return SkipLSTMState((state.detach() for state in self), self.gate.detach())


class SkipGRUState(NamedTuple):
    """``h_n`` as of :class:`torch.nn.GRU`, and ũ of the next timestep.

    Attributes:
        h: ``(K, B, H)``.
        gate: ũ, ``(G, B, 1)`` for G gates, in at least float32.
    """

    h: Tensor
    gate: Tensor

    def detach(self) -> SkipGRUState:
        """The same state, through which no gradient goes back."""
        return SkipGRUState(self.h.detach(), self.gate.detach())
