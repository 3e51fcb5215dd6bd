"""The equations of torch's own recurrent modules, one timestep at a time.

Shape suffixes: ``B`` batch, ``H`` hidden, ``G`` all gates together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradguard.nn._scan import Cell, States


@dataclass(frozen=True, eq=False)
class GateWeights:
    """Weights of the gates of one layer and direction, named and ordered as in torch."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> GateWeights:
        """Those among all parameters of a layer."""
        weight_hh, device = weights["weight_hh"], weights["weight_hh"].device.type
        if torch.is_autocast_enabled(device):  # which would convert its transpose at each timestep
            weight_hh = weight_hh.to(torch.get_autocast_dtype(device))
        biases = weights.get("bias_ih"), weights.get("bias_hh")
        return cls(weights["weight_ih"], weight_hh, *biases)

    @staticmethod
    def shapes(
        gates: int, features: int, hidden_size: int, *, bias: bool
    ) -> dict[str, tuple[int, ...]]:
        """By name, in torch's order."""
        rows = gates * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, features), "weight_hh": (rows, hidden_size)
        }  # fmt: skip
        return shapes | ({"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {})

    def from_input(self, x: Tensor, *, both_biases: bool) -> Tensor:
        """``W_ih x + b_ih``, and ``b_hh`` where it only ever stands in the same sum."""
        bias = self.bias_ih
        if both_biases and bias is not None and self.bias_hh is not None:
            bias = bias + self.bias_hh
        return torch.nn.functional.linear(x, self.weight_ih, bias)


@dataclass(frozen=True, eq=False)
class ElmanCell(Cell):
    """``h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``."""

    weights: GateWeights
    activation: Callable[[Tensor], Tensor] = torch.tanh

    def project(self, x: Tensor) -> States:
        """See :class:`Cell`."""
        return (self.weights.from_input(x, both_biases=True),)

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        return (self.activation(torch.addmm(projected[0], states[0], self.weights.weight_hh.T)),)


@dataclass(frozen=True, eq=False)
class LSTMCell(Cell):
    """Gates i, f, g, o; ``c_t = f c_{t-1} + i g``; ``h_t = o tanh(c_t)``."""

    weights: GateWeights

    def project(self, x: Tensor) -> States:
        """See :class:`Cell`."""
        return (self.weights.from_input(x, both_biases=True),)

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        h_BH, c_BH = states
        i, f, g, o = torch.addmm(projected[0], h_BH, self.weights.weight_hh.T).chunk(4, 1)
        c_BH = torch.sigmoid(f) * c_BH + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c_BH), c_BH


@dataclass(frozen=True, eq=False)
class GRUCell(Cell):
    """Gates r, z, n; ``n = tanh(W_in x + r (W_hn h + b_hn))``; ``h_t = (1 - z) n + z h_{t-1}``."""

    weights: GateWeights

    def project(self, x: Tensor) -> States:
        """See :class:`Cell`."""
        return (self.weights.from_input(x, both_biases=False),)

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        (h_BH,) = states
        w = self.weights
        recurrent_BG = torch.nn.functional.linear(h_BH, w.weight_hh, w.bias_hh)
        r_in, z_in, n_in = projected[0].chunk(3, 1)
        r_h, z_h, n_h = recurrent_BG.chunk(3, 1)
        r, z = torch.sigmoid(r_in + r_h), torch.sigmoid(z_in + z_h)
        n = torch.tanh(n_in + r * n_h)
        return (n + z * (h_BH - n),)
