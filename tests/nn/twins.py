"""Torch's own LSTM and GRU once more, as stacks that run timestep by timestep."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_gradguard.nn._scan import Cell
from lightning_gradguard.nn.equations import GateWeights, GRUCell, LSTMCell
from lightning_gradguard.nn.stack import RecurrentStack


class TwinLSTM(RecurrentStack):
    state_names = ("h", "c")

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        return GateWeights.shapes(4, features, self.hidden_size, bias=self.bias)

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        return LSTMCell(GateWeights.of(weights))


class TwinGRU(RecurrentStack):
    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        return GateWeights.shapes(3, features, self.hidden_size, bias=self.bias)

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        return GRUCell(GateWeights.of(weights))
