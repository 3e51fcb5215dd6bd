"""From the gradients of what a recurrent module returned back through its layers and through time.

Shape suffixes as in :mod:`lightning_gradguard.measure.adjoint`; ``F`` any number of features, and
``S`` before ``B``: signals that go back side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.measure._recurrences import (
    Chunk,
    ElmanRecurrence,
    GRURecurrence,
    LSTMRecurrence,
    Recurrence,
)
from lightning_gradguard.measure._replay import Replay
from lightning_gradguard.measure.spectral import spectral_radius

# Elements of one state in a chunk: the coefficients of a chunk take about ten times as much.
_CHUNK_ELEMENTS = 2**21
# Two kernels for the same formula may differ by this much of the largest output; a dropout mask or
# a weight that is not the one of the forward pass differs by far more.
_REPLAY_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


class ReplayError(RuntimeError):
    """The module's forward pass could not be repeated, so its adjoint would be wrong."""


@dataclass(eq=False)
class Direction:
    """The adjoint of one layer in one direction, in real time; see ``RecurrentAdjoint``."""

    hidden_TBP: Tensor
    cell_TBH: Tensor | None
    input_TBI: Tensor
    input_norms_TB: Tensor
    arriving_SB: Tensor
    transported_SB: Tensor
    followed_TB: Tensor
    causes: dict[str, Tensor]


class WayBack:
    """Goes back through the layers of one call.

    Args:
        replay: The call with all its states.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._call = replay.call
        self._layout = replay.call.layout
        x_TBI = replay.call.x_TBI
        self._alive_TB = self._layout.alive(x_TBI.device)
        size = x_TBI.shape[1] * replay.call.rnn.hidden_size
        self._chunk = max(1, min(self._layout.timesteps, _CHUNK_ELEMENTS // size))

    def run(self) -> tuple[list[Direction], Tensor]:
        """The adjoint of each layer and direction, and dL/dx_t.

        Raises:
            ReplayError: If the output is not the one of the call.
        """
        results: list[Direction] = []
        grad_TBF = self._call.grad_output_TBF
        directions = self._replay.directions
        for layer in range(self._call.rnn.num_layers - 1, -1, -1):
            grads = grad_TBF.chunk(directions, dim=-1)
            new = [self._through(layer, d, grads[d]) for d in range(directions)]
            results = new + results
            grad_TBF = sum((direction.input_TBI for direction in new[1:]), new[0].input_TBI)
            mask_TBF = self._replay.masks[layer]
            if mask_TBF is not None:
                grad_TBF = grad_TBF * mask_TBF
        return results, grad_TBF

    def _through(self, layer: int, direction: int, grad_TBP: Tensor) -> Direction:
        """Through time in one layer and direction."""
        k = layer * self._replay.directions + direction
        direct_TSBP = self._signals(k, self._replay.own(grad_TBP, direction))
        recurrence = self._recurrence(layer, direction, direct_TSBP.shape[1])
        parts = []
        steps = self._layout.timesteps
        for start in reversed(range(0, steps, self._chunk)):
            now = slice(start, min(start + self._chunk, steps))
            chunk = recurrence.backward(now.start, now.stop, direct_TSBP[now])
            parts.append(_Part.of(chunk, recurrence.h_TBP[now], self._alive_TB[now]))
        part = _Part.join(parts[::-1])
        if layer == self._call.rnn.num_layers - 1:
            self._check(part.residual.amax())
        causes = {recurrence.cause: part.cause.sum() / self._layout.lengths_B.sum()}
        if isinstance(recurrence, ElmanRecurrence):
            causes["spectral_radius"] = spectral_radius(self._replay.weights[k].hh)
        return self._in_real_time(part, k, direction, causes)

    def _signals(self, k: int, direct_TBP: Tensor) -> Tensor:
        """All that enters from above, and beside it the last that enters each sequence, alone.

        What enters on the way mixes fresh signal into the adjoint, so that its gain is not that of
        one gradient followed back.
        """
        grad_hn = self._call.grad_hn_KBP
        if grad_hn is not None:
            direct_TBP = self._layout.add_at_ends(direct_TBP, grad_hn[k])
        enters_TB = (direct_TBP != 0).any(-1)
        if self._call.grad_cn_KBH is not None:
            ends_B = (self._call.grad_cn_KBH[k] != 0).any(-1)
            enters_TB = self._layout.add_at_ends(enters_TB.float(), ends_B.float()) > 0
        later_TB = enters_TB.flip(0).cumsum(0).flip(0) - enters_TB.long()
        if not (enters_TB & (later_TB > 0)).any():
            return direct_TBP.unsqueeze(1)
        last_TBP = torch.where((enters_TB & (later_TB == 0)).unsqueeze(-1), direct_TBP, 0.0)
        return torch.stack([direct_TBP, last_TBP], dim=1)

    def _in_real_time(
        self, part: _Part, k: int, direction: int, causes: dict[str, Tensor]
    ) -> Direction:
        arriving_TSB, sent_TSB = part.hidden_norms_TSB, part.sent_norms_TSB
        if part.cell_sent_norms_TSB is not None:
            # What reaches c_t comes from step t + 1, or from the loss where a sequence ends.
            last = torch.zeros_like(arriving_TSB[:1])
            cell_TSB = torch.cat([part.cell_sent_norms_TSB[1:], last])
            if self._call.grad_cn_KBH is not None:
                cell_TSB = torch.stack(
                    [
                        self._layout.add_at_ends(cell_TB, _norm(self._call.grad_cn_KBH[k]))
                        for cell_TB in cell_TSB.unbind(1)
                    ],
                    dim=1,
                )
            arriving_TSB = torch.hypot(arriving_TSB, cell_TSB)
            sent_TSB = torch.hypot(sent_TSB, part.cell_sent_norms_TSB)
        own, layout = self._replay.own, self._layout
        arriving_SB, transported_SB = arriving_TSB[1:, 0], sent_TSB[1:, 0]
        if direction:
            arriving_SB = layout.reverse(arriving_SB, shorter_by=1)
            transported_SB = layout.reverse(transported_SB, shorter_by=1)
        return Direction(
            hidden_TBP=own(part.hidden_TBP, direction),
            cell_TBH=None if part.cell_TBH is None else own(part.cell_TBH, direction),
            input_TBI=own(part.input_TBI, direction),
            input_norms_TB=own(part.input_norms_TB, direction),
            arriving_SB=arriving_SB,
            transported_SB=transported_SB,
            followed_TB=own(arriving_TSB[:, -1], direction),
            causes=causes,
        )

    def _check(self, residual: Tensor) -> None:
        """Raise unless every known output follows from the one before it."""
        output_TBF = self._call.output_TBF
        if output_TBF is None:
            return
        finite_TBF = output_TBF.nan_to_num(posinf=0.0, neginf=0.0)
        largest = finite_TBF.abs().amax().clamp(min=1e-3)
        if not residual <= _REPLAY_TOLERANCE[self._call.output_dtype] * largest:
            raise ReplayError(
                f"output differs by {residual.item():.3g} from what the module returns for this "
                "input: weights, state or dropout mask are not those of the forward pass"
            )

    def _recurrence(self, layer: int, direction: int, signals: int) -> Recurrence:
        replay, rnn = self._replay, self._call.rnn
        k = layer * replay.directions + direction
        h0_BP, c0_BH = replay.start(k)
        x_TBI, h_TBP = replay.own(replay.inputs[layer], direction), replay.outputs[k]
        known = (replay.weights[k], x_TBI, h_TBP, h0_BP, signals)
        if isinstance(rnn, nn.GRU):
            return GRURecurrence(*known)
        if isinstance(rnn, nn.RNN):
            return ElmanRecurrence(*known, relu=rnn.nonlinearity == "relu")
        direct_cell_TBH = None
        if self._call.grad_cn_KBH is not None:
            zeros_TBH = x_TBI.new_zeros((*h_TBP.shape[:2], rnn.hidden_size))
            direct_cell_TBH = self._layout.add_at_ends(zeros_TBH, self._call.grad_cn_KBH[k])
        return LSTMRecurrence(
            *known, c0_BH=c0_BH, chunk=self._chunk, direct_cell_TBH=direct_cell_TBH
        )


@dataclass(eq=False)
class _Part:
    """What is kept of a chunk, or of all of them."""

    hidden_TBP: Tensor
    cell_TBH: Tensor | None
    input_TBI: Tensor
    input_norms_TB: Tensor
    hidden_norms_TSB: Tensor
    sent_norms_TSB: Tensor
    cell_sent_norms_TSB: Tensor | None
    cause: Tensor
    residual: Tensor

    @classmethod
    def of(cls, chunk: Chunk, h_TBP: Tensor, alive_TB: Tensor) -> _Part:
        cell, cell_sent = chunk.cell_TSBH, chunk.cell_sent_TSBH
        return cls(
            hidden_TBP=chunk.hidden_TSBP[:, 0],
            cell_TBH=None if cell is None else cell[:, 0],
            input_TBI=chunk.input_TBI,
            input_norms_TB=_norm(chunk.input_TBI),
            hidden_norms_TSB=_norm(chunk.hidden_TSBP),
            sent_norms_TSB=_norm(chunk.sent_TSBP),
            cell_sent_norms_TSB=None if cell_sent is None else _norm(cell_sent),
            cause=torch.where(alive_TB, chunk.cause_TB, 0.0).sum(),
            residual=_largest_difference(chunk.again_TBP, h_TBP, alive_TB),
        )

    @classmethod
    def join(cls, parts: list[_Part]) -> _Part:
        """The chunks of a sequence as one, in their order of time."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            join = torch.stack if values[0] is not None and values[0].dim() == 0 else torch.cat
            joined[field.name] = None if values[0] is None else join(values)
        return cls(**joined)


def _largest_difference(a_TBP: Tensor, b_TBP: Tensor, alive_TB: Tensor) -> Tensor:
    """0-dim; NaN and NaN do not differ, nor do two infinities of one sign."""
    same_TBP = (a_TBP == b_TBP) | (a_TBP.isnan() & b_TBP.isnan())
    difference_TB = (a_TBP - b_TBP).abs_().masked_fill_(same_TBP, 0.0).amax(-1)
    return torch.where(alive_TB, difference_TB, 0.0).amax()


def _norm(value: Tensor) -> Tensor:
    """Over the last dimension; squares of what has vanished leave the range of float32."""
    dtype = torch.float32 if value.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(value, dim=-1, dtype=dtype)
    return norm
