"""The backward recurrence of one layer in one direction, for each kind of recurrent module.

Given all states of the forward pass, everything but the recurrence itself is known beforehand: each
step back is one product with the recurrent weights and a few elementwise multiplications by
coefficients that were made for a whole chunk of timesteps at once.

Shape suffixes: ``T`` time (of a chunk), ``S`` signals that go back side by side, ``B`` batch, ``H``
hidden, ``P`` output of the projection (H without one), ``I`` input, ``N`` gates, ``G`` all gates
together (N times H).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# A sigmoid's or tanh's derivative from its value, times a factor, in one pass over memory.
_through_sigmoid = torch.ops.aten.sigmoid_backward
_through_tanh = torch.ops.aten.tanh_backward


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one layer and direction, named as in torch; 0-dim zeros for absent biases."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    hr: Tensor | None = None


@dataclass(eq=False)
class Chunk:
    """What one chunk of timesteps gives, in the direction's own order of time.

    Attributes:
        hidden_TSBP: Adjoint of h_t.
        sent_TSBP: What h_{t-1} receives from step t.
        input_TBI: Gradient of the input, for the first signal.
        cause_TB: What explains the decay, mean over the hidden units.
        again_TBP: h_t computed from h_{t-1}.
        cell_TSBH: Total adjoint of c_t.
        cell_sent_TSBH: What c_{t-1} receives from step t.
    """

    hidden_TSBP: Tensor
    sent_TSBP: Tensor
    input_TBI: Tensor
    cause_TB: Tensor
    again_TBP: Tensor
    cell_TSBH: Tensor | None = None
    cell_sent_TSBH: Tensor | None = None


class Recurrence(ABC):
    """One layer in one direction.

    Args:
        weights: Its weights.
        x_TBI: Its input, of the whole sequence.
        h_TBP: Its output, of the whole sequence.
        h0_BP: State before the first timestep.
        signals: How many gradients go back side by side.
    """

    cause: str

    def __init__(
        self, weights: Weights, x_TBI: Tensor, h_TBP: Tensor, h0_BP: Tensor, signals: int
    ) -> None:
        self.weights = weights
        self.x_TBI = x_TBI
        self.h_TBP = h_TBP
        self.h0_BP = h0_BP
        self.carry_SBP = h0_BP.new_zeros((signals, *h0_BP.shape))

    @abstractmethod
    def backward(self, start: int, stop: int, direct_TSBP: Tensor) -> Chunk:
        """Go back through ``start <= t < stop``, from where the last call ended.

        Args:
            start: First timestep of the chunk.
            stop: The timestep after its last.
            direct_TSBP: Direct gradient of the outputs of the chunk.
        """

    def _previous(self, start: int, stop: int) -> Tensor:
        """The states that the timesteps of a chunk begin with."""
        if start:
            return self.h_TBP[start - 1 : stop - 1]
        return torch.cat([self.h0_BP.unsqueeze(0), self.h_TBP[: stop - 1]])


class ElmanRecurrence(Recurrence):
    """``h_t = act(W_ih x_t + W_hh h_{t-1} + b)``."""

    cause = "activation_slope"

    def __init__(
        self,
        weights: Weights,
        x_TBI: Tensor,
        h_TBP: Tensor,
        h0_BP: Tensor,
        signals: int,
        *,
        relu: bool,
    ) -> None:
        super().__init__(weights, x_TBI, h_TBP, h0_BP, signals)
        self._relu = relu

    def backward(self, start: int, stop: int, direct_TSBP: Tensor) -> Chunk:
        """See :meth:`Recurrence.backward`."""
        w = self.weights
        h_TBH = self.h_TBP[start:stop]
        again_TBH = self.x_TBI[start:stop] @ w.ih.T + (w.bias_ih + w.bias_hh)
        again_TBH += self._previous(start, stop) @ w.hh.T
        # NaN compares as False: without the product a NaN would pass for a dead unit.
        slope_TBH = (h_TBH > 0) + 0.0 * h_TBH if self._relu else 1.0 - h_TBH.square()
        hidden, sent, pre = (torch.empty_like(direct_TSBP) for _ in range(3))
        rows, sent_rows = pre.flatten(1, 2), sent.flatten(1, 2)
        for t in range(stop - start - 1, -1, -1):
            torch.add(direct_TSBP[t], self.carry_SBP, out=hidden[t])
            torch.mul(hidden[t], slope_TBH[t], out=pre[t])
            torch.mm(rows[t], w.hh, out=sent_rows[t])
            self.carry_SBP = sent[t]
        again_TBH = again_TBH.relu_() if self._relu else again_TBH.tanh_()
        return Chunk(hidden, sent, pre[:, 0] @ w.ih, slope_TBH.mean(-1), again_TBH)


class GRURecurrence(Recurrence):
    """``h_t = (1 - z_t) n_t + z_t h_{t-1}``, with the reset gate after the product, as in torch."""

    cause = "update_gate"

    def backward(self, start: int, stop: int, direct_TSBP: Tensor) -> Chunk:
        """See :meth:`Recurrence.backward`."""
        w = self.weights
        before_TBH = self._previous(start, stop)
        steps, batch, width = before_TBH.shape
        two = 2 * width
        x_TBG = self.x_TBI[start:stop] @ w.ih.T + w.bias_ih
        h_TBG = before_TBH @ w.hh.T + w.bias_hh
        r, z = (x_TBG[..., :two] + h_TBG[..., :two]).sigmoid_().chunk(2, -1)
        from_h = h_TBG[..., two:]
        n = torch.addcmul(x_TBG[..., two:], r, from_h).tanh_()
        to_n = _through_tanh(1.0 - z, n)
        # How dL/dh_t enters the gates r, z, the product under r, and h_{t-1} directly.
        factors_TBNH = before_TBH.new_empty((steps, batch, 4, width))
        _through_sigmoid(to_n * from_h, r, grad_input=factors_TBNH[:, :, 0])
        _through_sigmoid(before_TBH - n, z, grad_input=factors_TBNH[:, :, 1])
        torch.mul(to_n, r, out=factors_TBNH[:, :, 2])
        factors_TBNH[:, :, 3] = z
        signals = direct_TSBP.shape[1]
        parts = before_TBH.new_empty((steps, signals, batch, 4, width))
        rows = parts.view(steps, signals * batch, 4 * width)
        hidden, sent = torch.empty_like(direct_TSBP), torch.empty_like(direct_TSBP)
        sent_rows = sent.flatten(1, 2)
        for t in range(steps - 1, -1, -1):
            torch.add(direct_TSBP[t], self.carry_SBP, out=hidden[t])
            torch.mul(factors_TBNH[t], hidden[t].unsqueeze(2), out=parts[t])
            gates, kept = rows[t, :, : 3 * width], rows[t, :, 3 * width :]
            torch.addmm(kept, gates, w.hh, out=sent_rows[t])
            self.carry_SBP = sent[t]
        # The input enters the candidate beside the product under r, not through it.
        gates_TBG = parts[:, 0, :, :2].flatten(2)
        input_TBI = gates_TBG @ w.ih[:two] + to_n.mul_(hidden[:, 0]) @ w.ih[two:]
        return Chunk(hidden, sent, input_TBI, z.mean(-1), n.lerp_(before_TBH, z))


class LSTMRecurrence(Recurrence):
    """``c_t = f_t c_{t-1} + i_t g_t``, ``h_t = o_t tanh(c_t)``, projected if there is a projection.

    Args:
        weights: As in :class:`Recurrence`.
        x_TBI: As in :class:`Recurrence`.
        h_TBP: As in :class:`Recurrence`.
        h0_BP: As in :class:`Recurrence`.
        signals: As in :class:`Recurrence`.
        c0_BH: Cell state before the first timestep.
        chunk: Timesteps in a chunk.
        direct_cell_TBH: Direct gradient of the cell states, or ``None``.
    """

    cause = "forget_gate"

    def __init__(
        self,
        weights: Weights,
        x_TBI: Tensor,
        h_TBP: Tensor,
        h0_BP: Tensor,
        signals: int,
        *,
        c0_BH: Tensor,
        chunk: int,
        direct_cell_TBH: Tensor | None,
    ) -> None:
        super().__init__(weights, x_TBI, h_TBP, h0_BP, signals)
        self._c0_BH = c0_BH
        self._direct_cell_TBH = direct_cell_TBH
        self._cell_carry_SBH = c0_BH.new_zeros((signals, *c0_BH.shape))
        # In the order o, i, f, g the three sigmoids are in one piece, and so is what follows from
        # dL/dc_t.
        self._ih, self._hh = _output_gate_first(weights.ih), _output_gate_first(weights.hh)
        bias = weights.bias_ih + weights.bias_hh
        self._bias = _output_gate_first(bias) if bias.dim() else bias
        self._c_TBH = x_TBI.new_empty((*h_TBP.shape[:2], c0_BH.shape[-1]))
        self._gates: tuple[int, Tensor] | None = None
        self._scan(chunk)

    def _scan(self, chunk: int) -> None:
        """Find all cell states: the gates need only h, so what is left is elementwise."""
        steps = len(self._c_TBH)
        c = self._c0_BH
        for start in range(0, steps, chunk):
            _, i, f, g = self._gates_of(start, min(start + chunk, steps)).unbind(2)
            new = i * g
            for t in range(len(new)):
                c = torch.addcmul(new[t], f[t], c, out=self._c_TBH[start + t])

    def _gates_of(self, start: int, stop: int) -> Tensor:
        """The gates o, i, f, g of a chunk, ``(T, B, 4, H)``; those asked for last are kept."""
        if self._gates is None or self._gates[0] != start:
            gates = self.x_TBI[start:stop] @ self._ih.T + self._bias
            gates += self._previous(start, stop) @ self._hh.T
            gates = gates.unflatten(-1, (4, -1))
            gates[:, :, :3].sigmoid_()
            gates[:, :, 3].tanh_()
            self._gates = (start, gates)
        return self._gates[1]

    def backward(self, start: int, stop: int, direct_TSBP: Tensor) -> Chunk:
        """See :meth:`Recurrence.backward`."""
        o, i, f, g = self._gates_of(start, stop).unbind(2)
        c = self._c_TBH[start:stop]
        before = self._c_TBH[start - 1] if start else self._c0_BH
        tanh_c = c.tanh()
        to_cell = _through_tanh(o, tanh_c)
        to_output_gate = _through_sigmoid(tanh_c, o)
        steps, batch, width = c.shape
        # How dL/dc_t enters the gates i, f, g, and c_{t-1}.
        factors_TBNH = c.new_empty((steps, batch, 4, width))
        _through_sigmoid(g, i, grad_input=factors_TBNH[:, :, 0])
        _through_sigmoid(c[:-1], f[1:], grad_input=factors_TBNH[1:, :, 1])
        _through_sigmoid(before, f[0], grad_input=factors_TBNH[0, :, 1])
        _through_tanh(i, g, grad_input=factors_TBNH[:, :, 2])
        factors_TBNH[:, :, 3] = f
        signals = direct_TSBP.shape[1]
        parts = c.new_empty((steps, signals, batch, 5, width))  # o, i, f, g, c_{t-1}
        gates = parts.view(steps, signals * batch, 5 * width)[..., : 4 * width]
        hidden, sent = torch.empty_like(direct_TSBP), torch.empty_like(direct_TSBP)
        sent_rows = sent.flatten(1, 2)
        cell = c.new_empty((steps, signals, batch, width))
        hr = self.weights.hr
        for t in range(steps - 1, -1, -1):
            torch.add(direct_TSBP[t], self.carry_SBP, out=hidden[t])
            unprojected = hidden[t] if hr is None else hidden[t] @ hr
            arriving = self._cell_carry_SBH
            if self._direct_cell_TBH is not None:
                arriving = arriving + self._direct_cell_TBH[start + t]
            torch.addcmul(arriving, unprojected, to_cell[t], out=cell[t])
            torch.mul(unprojected, to_output_gate[t], out=parts[t, :, :, 0])
            torch.mul(factors_TBNH[t], cell[t].unsqueeze(2), out=parts[t, :, :, 1:])
            self._cell_carry_SBH = parts[t, :, :, 4]
            torch.mm(gates[t], self._hh, out=sent_rows[t])
            self.carry_SBP = sent[t]
        again = tanh_c.mul_(o)
        return Chunk(
            hidden,
            sent,
            gates[:, :batch] @ self._ih,
            f.mean(-1),
            again if hr is None else again @ hr.T,
            cell,
            parts[:, :, :, 4],
        )


def _output_gate_first(weight: Tensor) -> Tensor:
    """From torch's order of gates i, f, g, o to o, i, f, g."""
    rest = 3 * (len(weight) // 4)
    return torch.cat([weight[rest:], weight[:rest]])
