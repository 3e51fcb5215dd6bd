"""LSTM and GRU that learn at which timesteps to update their state, and copy it at the others.

Shape suffixes: ``T`` time, ``B`` batch, ``K`` layers times directions, ``G`` gates, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from lightning_gradguard.nn._gates import recurrent_layers
from lightning_gradguard.nn._scan import Cell
from lightning_gradguard.nn._skip_budget import Gates, skip_budget_loss, update_share
from lightning_gradguard.nn._skip_stack import SkipStack
from lightning_gradguard.nn._skip_state import SkipGRUState, SkipLSTMState
from lightning_gradguard.nn.equations import GateWeights, GRUCell, LSTMCell
from lightning_gradguard.nn.init import forget_bias_

__all__ = [
    "Gates",
    "SkipGRU",
    "SkipGRUState",
    "SkipLSTM",
    "SkipLSTMState",
    "skip_budget_loss",
    "update_share",
]


class SkipLSTM(SkipStack):
    """LSTM that copies h and c at the timesteps at which it need not update them.

    See :class:`~lightning_gradguard.nn._skip_stack.SkipStack` for the equations and the arguments.
    S is :class:`torch.nn.LSTM`, with its parameter names, and Δũ reads c_t:
    Δũ_t = σ(``weight_update`` c_t + ``bias_update``). The biases of the forget gate are 1 together
    at first, as in the paper.

    The state is ``(h_n, c_n)`` with ũ in an attribute, a :class:`SkipLSTMState`, so that this can
    stand where an ``nn.LSTM`` stood and a sequence be run in chunks all the same. As ``hx`` go such
    a state, a plain ``(h, c)``, with which the gate begins anew, and ``(h, c, gate)``.

    Example:
        >>> import torch
        >>> skip = SkipLSTM(3, 5)
        >>> x = torch.randn(20, 2, 3)
        >>> output, (h_n, c_n) = skip(x)
        >>> output, state, gates = skip(x, return_gates=True)
        >>> gates.shape
        torch.Size([20, 2])
        >>> loss = output[-1].square().mean() + skip_budget_loss(gates, 1e-5)
        >>> output, state = skip(torch.randn(9, 2, 3), state.detach())  # goes on with the 21st
        >>> skip
        SkipLSTM(3, 5)
    """

    state_names: ClassVar[tuple[str, ...]] = ("h", "c", "gate")
    _gate_count = 4

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        return LSTMCell(GateWeights.of(weights))

    def _set_gate_biases(self) -> None:
        forget_bias_(self, 1.0)

    def _state(self, own: Sequence[Tensor], gate: Tensor) -> SkipLSTMState:
        return SkipLSTMState(own, gate)


class SkipGRU(SkipStack):
    """GRU that copies h at the timesteps at which it need not update it.

    See :class:`~lightning_gradguard.nn._skip_stack.SkipStack` for the equations and the arguments.
    S is :class:`torch.nn.GRU`, with its parameter names, and so resets after the matrix; the GRU of
    the paper resets before it. Δũ reads h_t. The biases of r and z are 1 together at first, as in
    the paper; z is the share of h that is kept.

    The state is ``(h_n, gate)``, a :class:`SkipGRUState`, where ``nn.GRU`` returns h_n alone: a
    tensor has no place for a second one. As ``hx`` go such a pair and h alone, with which the gate
    begins anew.

    Example:
        >>> import torch
        >>> skip = SkipGRU(3, 5, num_layers=2, share_gate=False)
        >>> output, (h_n, gate), gates = skip(torch.randn(20, 2, 3), return_gates=True)
        >>> h_n.shape, gate.shape
        (torch.Size([2, 2, 5]), torch.Size([2, 2, 1]))
        >>> [used.shape for used in gates]  # one gate for each layer
        [torch.Size([20, 2]), torch.Size([20, 2])]
        >>> skip
        SkipGRU(3, 5, num_layers=2, share_gate=False)
    """

    state_names: ClassVar[tuple[str, ...]] = ("h", "gate")
    _gate_count = 3

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        return GRUCell(GateWeights.of(weights))

    def _set_gate_biases(self) -> None:
        for layer in recurrent_layers(self):
            first, second = (layer.blocks(bias) for bias in layer.biases)
            for gate in ("r", "z"):
                first[gate].fill_(1.0)
                second[gate].zero_()

    def _state(self, own: Sequence[Tensor], gate: Tensor) -> SkipGRUState:
        return SkipGRUState(own[0], gate)
