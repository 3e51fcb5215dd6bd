"""The equations of :class:`LayerNormLSTM` and :class:`LayerNormGRU`, one timestep at a time.

Shape suffixes: ``B`` batch, ``H`` hidden, ``G`` all gates together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_gradguard.nn._noise import RecurrentNoise, zone_out
from lightning_gradguard.nn._scan import Cell, States
from lightning_gradguard.nn.equations import GateWeights


@dataclass(frozen=True, eq=False)
class LayerNormLSTMCell(Cell):
    """One layer and direction of :class:`LayerNormLSTM`; no ``gain_c``, no norm of c."""

    weights: GateWeights
    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor | None
    bias_c: Tensor | None
    eps: float
    noise: RecurrentNoise

    def project(self, x: Tensor) -> States:
        """See :class:`Cell`."""
        w = self.weights
        bias = None if w.bias_ih is None or w.bias_hh is None else w.bias_ih + w.bias_hh
        gates = linear(x, w.weight_ih)
        gates = torch.layer_norm(gates, self.gain_ih.shape, self.gain_ih, bias, self.eps)
        return (gates, *self.noise.draw(x, w.weight_hh.size(1)))

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        h_BH, c_BH = states
        drop, zone_h, zone_c = self.noise.read(projected[1:])
        recurrent_BG = linear(h_BH, self.weights.weight_hh)
        shape = self.gain_hh.shape
        gates_BG = projected[0] + torch.layer_norm(
            recurrent_BG, shape, self.gain_hh, None, self.eps
        )
        i, f, g, o = gates_BG.chunk(4, 1)
        g = torch.tanh(g)
        if drop is not None:
            g = g * drop
        c = read = torch.addcmul(torch.sigmoid(i) * g, torch.sigmoid(f), c_BH)
        if self.gain_c is not None:
            read = torch.layer_norm(c, self.gain_c.shape, self.gain_c, self.bias_c, self.eps)
        h = torch.sigmoid(o) * torch.tanh(read)
        keep_h, keep_c = self.noise.zoneout
        return zone_out(h, h_BH, keep_h, zone_h), zone_out(c, c_BH, keep_c, zone_c)


@dataclass(frozen=True, eq=False)
class LayerNormGRUCell(Cell):
    """One layer and direction of :class:`LayerNormGRU`; pairs are of r and z together, and of n."""

    weights: GateWeights
    gains_ih: tuple[Tensor, Tensor]
    gains_hh: tuple[Tensor, Tensor]
    biases_ih: tuple[Tensor | None, Tensor | None]
    biases_hh: tuple[Tensor | None, Tensor | None]
    eps: float
    noise: RecurrentNoise

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], eps: float, noise: RecurrentNoise
    ) -> LayerNormGRUCell:
        """With all parameters of a layer."""
        w = GateWeights.of(weights)
        H = w.weight_hh.size(1)
        gains = [weights[name].split((2 * H, H)) for name in ("gain_ih", "gain_hh")]
        in_rz = in_n = rec_n = None
        if w.bias_ih is not None and w.bias_hh is not None:
            in_rz, in_n = w.bias_ih.split((2 * H, H))
            rec_rz, rec_n = w.bias_hh.split((2 * H, H))
            in_rz = in_rz + rec_rz
        return cls(w, gains[0], gains[1], (in_rz, in_n), (None, rec_n), eps, noise)

    def project(self, x: Tensor) -> States:
        """See :class:`Cell`."""
        H = self.weights.weight_hh.size(1)
        parts = linear(x, self.weights.weight_ih).split((2 * H, H), -1)
        return (*self._normed(parts, self.gains_ih, self.biases_ih), *self.noise.draw(x, H))

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        (h_BH,) = states
        H = h_BH.size(1)
        rz_in, n_in, *masks = projected
        drop, zone_h = self.noise.read(masks)
        parts = linear(h_BH, self.weights.weight_hh).split((2 * H, H), 1)
        rz_h, n_h = self._normed(parts, self.gains_hh, self.biases_hh)
        r, z = torch.sigmoid(rz_in + rz_h).chunk(2, 1)
        n = torch.tanh(n_in + r * n_h)
        if drop is not None:
            n = n * drop
        return (zone_out(n + z * (h_BH - n), h_BH, self.noise.zoneout[0], zone_h),)

    def _normed(
        self,
        parts: tuple[Tensor, ...],
        gains: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
    ) -> States:
        return tuple(
            torch.layer_norm(part, gain.shape, gain, bias, self.eps)
            for part, gain, bias in zip(parts, gains, biases, strict=True)
        )
