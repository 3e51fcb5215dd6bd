"""Recurrent modules unrolled: one sequence and one timestep after the other.

Everything is computed in float64 from the weights of the ``nn`` module, without its kernels.
Gradients come from ``torch.autograd.grad`` at nodes put into the graph for that, and transport from
the vector-Jacobian product of the cell, not from a difference of gradients.

Shapes: T time, B batch, I input, H hidden, P hidden as it leaves the cell (after a projection),
O output (directions * P), K layers * directions, N rows of any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from tests.measure.recurrent_cells import Recurrent, State, Step, directions, step_of, width


@dataclass(frozen=True)
class Layer:
    """What one layer and direction did with one sequence, by timestep."""

    entered: dict[int, Tensor] = field(default_factory=dict)  # a node of its own per direction
    hidden: dict[int, Tensor] = field(default_factory=dict)
    cell: dict[int, Tensor] = field(default_factory=dict)  # before it is read out into hidden
    carry: dict[int, Tensor] = field(default_factory=dict)  # what of it goes on in time only
    gates: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    output: Tensor  # (T, B, O), zero beyond a sequence's end
    h_n: Tensor  # (K, B, P)
    c_n: Tensor | None  # (K, B, H)
    hidden: Tensor  # (K, T, B, P)
    cell: Tensor | None  # (K, T, B, H)
    input: Tensor  # (T, B, I)
    arriving: Tensor  # (K, T - 1, B)
    transported: Tensor  # (K, T - 1, B)
    input_norms: Tensor  # (K, T, B)
    causes: list[float]  # by k: mean forget gate, update gate, or activation slope
    loss: Tensor  # still attached, for gradients of the weights

    @property
    def gain(self) -> Tensor:
        pooled = self.transported.square().sum(-1) / self.arriving.square().sum(-1)
        return pooled.sqrt()


def time_major(rnn: Recurrent, value: Tensor | PackedSequence) -> Tensor:
    """An input, an output or a gradient of one as (T, B, ...) in float64, in the caller's order."""
    if isinstance(value, PackedSequence):
        return pad_packed_sequence(value)[0].double()
    if value.dim() == 2:
        return value.double().unsqueeze(1)
    return value.double().transpose(0, 1) if rnn.batch_first else value.double()


def lengths_of(rnn: Recurrent, value: Tensor | PackedSequence) -> list[int]:
    if isinstance(value, PackedSequence):
        return pad_packed_sequence(value)[1].tolist()
    steps, sequences = time_major(rnn, value).shape[:2]
    return [steps] * sequences


def batched(state: Tensor) -> Tensor:
    return (state.unsqueeze(1) if state.dim() == 2 else state).double()


def run(step: Step, entered: Sequence[Tensor], state: State, *, reverse: bool) -> Layer:
    trace = Layer()
    for t in reversed(range(len(entered))) if reverse else range(len(entered)):
        trace.entered[t] = entered[t] * 1
        state, trace.gates[t] = step(trace.entered[t], state)
        trace.hidden[t] = state[0]
        if len(state) == 2:
            trace.cell[t] = state[1]
            trace.carry[t] = state[1] * 1
            state = (state[0], trace.carry[t])
    return trace


def unroll(
    rnn: Recurrent,
    x_TI: Sequence[Tensor],
    start: list[State],
    masks: Sequence[Sequence[Tensor]] | None,
) -> tuple[list[Layer], list[Tensor]]:
    """One sequence through all layers; ``masks[layer][t]`` multiplies what goes to the next."""
    traces: list[Layer] = []
    below = list(x_TI)
    for layer in range(rnn.num_layers):
        ways = range(layer * directions(rnn), (layer + 1) * directions(rnn))
        for k in ways:
            backwards = k > ways[0]
            traces.append(run(step_of(rnn, k), below, start[k], reverse=backwards))
        below = [torch.cat([traces[k].hidden[t] for k in ways]) for t in range(len(x_TI))]
        if masks is not None and layer < rnn.num_layers - 1:
            below = [h * mask for h, mask in zip(below, masks[layer], strict=True)]
    return traces, below


def flow(length: int, *, reverse: bool) -> list[tuple[int, int, int]]:
    """(boundary, timestep it leaves, timestep it enters) in the direction's own flow."""
    return [(t, t + 1, t) if reverse else (t, t, t + 1) for t in range(length - 1)]


def pullback(
    step: Step, entered: Sequence[Tensor], states: list[State], adjoints: list[State]
) -> Tensor:
    """‖Jᵀλ‖ of one cell step, for many rows at once."""
    x_NI = torch.stack([x.detach() for x in entered])
    state = tuple(torch.stack(rows).detach().requires_grad_() for rows in zip(*states, strict=True))
    after, _ = step(x_NI, state)
    adjoint = [torch.stack(rows) for rows in zip(*adjoints, strict=True)]
    pulled = torch.autograd.grad(after, state, adjoint, materialize_grads=True)
    return torch.cat(pulled, dim=1).norm(dim=1)


class Unrolled:
    """The graph of all sequences, and its gradients at every node."""

    def __init__(
        self,
        rnn: Recurrent,
        x: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None,
        masks: Sequence[Tensor] | None,
    ) -> None:
        self.rnn = rnn
        self.lengths = lengths_of(rnn, x)
        self.x_TBI = time_major(rnn, x).detach().requires_grad_()
        self.ks = range(rnn.num_layers * directions(rnn))
        self.states = ("hidden", "carry") if isinstance(rnn, nn.LSTM) else ("hidden",)
        start = self.start(hx)
        # By sequence and then by k.
        self.traces: list[list[Layer]] = []
        tops = []
        for b, length in enumerate(self.lengths):
            x_TI = list(self.x_TBI[:length, b])
            dropped = None if masks is None else [mask[:length, b].double() for mask in masks]
            trace, top = unroll(
                rnn, x_TI, [tuple(part[k, b] for part in start) for k in self.ks], dropped
            )
            self.traces.append(trace)
            tops.append(torch.stack(top))
        self.output_TBO = nn.utils.rnn.pad_sequence(tops)

    def start(self, hx: Tensor | tuple[Tensor, Tensor] | None) -> State:
        if hx is not None:
            return tuple(batched(part).detach() for part in ([hx] if torch.is_tensor(hx) else hx))
        rows = (len(self.ks), len(self.lengths))
        sizes = (width(self.rnn), self.rnn.hidden_size)[: len(self.states)]
        return tuple(self.x_TBI.new_zeros(*rows, size) for size in sizes)

    def last(self, name: str) -> Tensor:
        """The state that each layer and direction ends with, (K, B, ...)."""
        ends = [[list(getattr(s[k], name).values())[-1] for s in self.traces] for k in self.ks]
        return torch.stack([torch.stack(row) for row in ends])

    def differentiate(self, loss: Tensor) -> None:
        self.places = [
            (name, k, t, b)
            for b, trace in enumerate(self.traces)
            for k, layer in enumerate(trace)
            for name in ("entered", "hidden", "cell", "carry")
            for t in getattr(layer, name)
        ]
        nodes = [getattr(self.traces[b][k], name)[t] for name, k, t, b in self.places]
        grads = torch.autograd.grad(
            loss, [self.x_TBI, *nodes], retain_graph=True, materialize_grads=True
        )
        self.grad_TBI = grads[0]
        self.grads = dict(zip(self.places, grads[1:], strict=True))

    def collect(self, wanted: str, size: int) -> Tensor:
        values = torch.zeros(len(self.ks), *self.x_TBI.shape[:2], size, dtype=torch.float64)
        for name, k, t, b in self.places:
            if name == wanted:
                values[k, t, b] = self.grads[name, k, t, b]
        return values

    def input_norms(self) -> Tensor:
        norms = torch.zeros(len(self.ks), *self.x_TBI.shape[:2], dtype=torch.float64)
        for name, k, t, b in self.places:
            if name == "entered":
                norms[k, t, b] = self.grads[name, k, t, b].norm()
        return norms

    def transport(self) -> tuple[Tensor, Tensor]:
        steps, sequences = self.x_TBI.shape[:2]
        arriving = torch.zeros(len(self.ks), steps - 1, sequences, dtype=torch.float64)
        transported = arriving.clone()
        for k in self.ks:
            moves = [
                (b, *move)
                for b, length in enumerate(self.lengths)
                for move in flow(length, reverse=k % directions(self.rnn) == 1)
            ]
            if not moves:
                continue
            entered = [self.traces[b][k].entered[to] for b, _, _, to in moves]
            states = [
                tuple(getattr(self.traces[b][k], name)[start] for name in self.states)
                for b, _, start, _ in moves
            ]
            adjoints = [
                tuple(self.grads[name, k, to, b] for name in self.states) for b, _, _, to in moves
            ]
            norms = pullback(step_of(self.rnn, k), entered, states, adjoints)
            for (b, boundary, _, _), adjoint, norm in zip(moves, adjoints, norms, strict=True):
                arriving[k, boundary, b] = torch.cat(adjoint).norm()
                transported[k, boundary, b] = norm
        return arriving, transported

    def causes(self) -> list[float]:
        gates = [[gate for s in self.traces for gate in s[k].gates.values()] for k in self.ks]
        return [torch.stack(rows).mean().item() for rows in gates]


def recurrent_reference(
    rnn: Recurrent,
    x: Tensor | PackedSequence,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    grad_output: Tensor | PackedSequence | None = None,
    grad_hn: Tensor | None = None,
    grad_cn: Tensor | None = None,
    masks: Sequence[Tensor] | None = None,
) -> Reference:
    """Outputs and adjoints of ``rnn``; ``masks``: one (T, B, O) factor per layer but the last."""
    unrolled = Unrolled(rnn, x, hx, masks)
    gated = isinstance(rnn, nn.LSTM)
    h_n, c_n = unrolled.last("hidden"), unrolled.last("carry") if gated else None
    loss = unrolled.x_TBI.new_zeros(())
    if grad_output is not None:
        loss = loss + (unrolled.output_TBO * time_major(rnn, grad_output)).sum()
    if grad_hn is not None:
        loss = loss + (h_n * batched(grad_hn)).sum()
    if grad_cn is not None:
        loss = loss + (c_n * batched(grad_cn)).sum()
    unrolled.differentiate(loss)
    arriving, transported = unrolled.transport()
    return Reference(
        output=unrolled.output_TBO.detach(),
        h_n=h_n.detach(),
        c_n=c_n.detach() if gated else None,
        hidden=unrolled.collect("hidden", width(rnn)),
        cell=unrolled.collect("cell", rnn.hidden_size) if gated else None,
        input=unrolled.grad_TBI,
        arriving=arriving,
        transported=transported,
        input_norms=unrolled.input_norms(),
        causes=unrolled.causes(),
        loss=loss,
    )
