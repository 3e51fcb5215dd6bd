"""The reading of a cell from the chain of its calls.

The adjoint of the last state of a sequence is taken back through one call after the other. The
gradients that hooks see on the way would not do: what they hold of the loss at each timestep is
new, and does not decay as what has come a long way.

Shape suffixes: ``T`` time (calls of a chain), ``B`` batch, ``S`` boundaries between timesteps,
``R`` those sequences of the batch that were kept, ``I`` input, ``H`` hidden, ``G`` all gates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrize import is_parametrized

from lightning_gradguard.measure._capture import special_weights
from lightning_gradguard.measure._cells import Cell, CellCall, CellWatch, weight_versions
from lightning_gradguard.measure._drafts import Draft, decay_numbers, doubts, reached, stacked
from lightning_gradguard.measure._recurrences import (
    ElmanRecurrence,
    GRURecurrence,
    LSTMRecurrence,
    Recurrence,
    Weights,
)
from lightning_gradguard.measure._recurrent_kinds import has_biases, recurrent_kind
from lightning_gradguard.measure._taps import feature_norms
from lightning_gradguard.measure._way_back import _CHUNK_ELEMENTS, _REPLAY_TOLERANCE
from lightning_gradguard.measure.decay import bin_profile, float_floor, recency, transport_decay
from lightning_gradguard.measure.spectral import spectral_radius
from lightning_gradguard.readings import TimeReading

_NO_CHAIN = "no call of it was given the state that another call had returned"
_MISMATCH = (
    "not measured exactly: a call of it returned something else than its weights, input and "
    "state give now"
)


def cell_drafts(watch: CellWatch) -> list[Draft]:
    """The reading of all calls of a cell."""
    chains = _chains(sorted(watch.calls, key=lambda call: call.number))
    if not chains:
        return []
    cell = watch.module
    reading = TimeReading(watch.name, "", "exact", recurrent_kind(cell), bias=has_biases(cell))
    returned_TB = _over(chains, [[_returned_norm(call) for call in chain] for chain in chains])
    input_TB = _over(chains, [[_input_norm(call) for call in chain] for chain in chains])
    timesteps, sequences = returned_TB.shape
    reading = replace(reading, timesteps=timesteps, sequences=sequences)
    if timesteps == 1:
        return [Draft(replace(reading, note=_NO_CHAIN))]
    reached_TB = reached(returned_TB)
    draft = Draft(
        reading,
        numbers={
            "recency": recency(input_TB, reached_TB.sum(0)),
            "profile": bin_profile(returned_TB, reached_TB),
        },
        doubts=doubts(returned_TB),
    )
    # Calls are kept in their order, so of each chain the first ones.
    kept = [[call for call in chain if call.x_RI is not None] for chain in chains]
    kept = [chain for chain in kept if len(chain) > 1]
    why_not = _why_not(watch, chains) or ("" if kept else "its states are too large to be kept")
    if why_not:
        note = f"not measured exactly: {why_not}"
        return [replace(draft, reading=replace(reading, note=note))]
    return [_with_rate(draft, cell, kept)]


def _with_rate(draft: Draft, cell: Cell, chains: list[list[CellCall]]) -> Draft:
    with torch.autocast(cell.weight_hh.device.type, enabled=False):
        sides = [_step_back(cell, chain) for chain in chains]
    arriving_SR = stacked([side[0] for side in sides])
    transported_SR = stacked([side[1] for side in sides])
    decay = transport_decay(
        arriving_SR, transported_SR, float_floor(cell.weight_hh.dtype, cell.hidden_size)
    )
    longest, timesteps = max(map(len, chains)), draft.reading.timesteps
    note = ""
    if longest < timesteps:
        note = f"only the first {longest} of {timesteps} timesteps were kept for the rate"
    return replace(
        draft,
        reading=replace(draft.reading, sequences=arriving_SR.shape[1], note=note),
        numbers={**decay_numbers(decay), **draft.numbers},
        causes=_causes(cell, chains),
        doubts={**draft.doubts, _MISMATCH: torch.stack([side[2] for side in sides]).any()},
    )


def _why_not(watch: CellWatch, chains: list[list[CellCall]]) -> str:
    """Why the calls alone do not give the rate; empty if they do."""
    special = special_weights(watch.module) or _special_forward(watch.module)
    if special:
        return special
    calls = [call for chain in chains for call in chain]
    if any(call.altered for call in calls):
        return "the loop changes the state between its calls"
    if any(call.fed_back for call in calls):
        return "its input depends on its own state, on which way the gradient goes back as well"
    if weight_versions(watch.module) != watch.versions:
        return "its weights changed between the forward pass and the measurement"
    return ""


def _special_forward(cell: Cell) -> str:
    """Why its forward must not run once more: that might draw random numbers or change buffers."""
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if cell.bias else [])]
    registered = dict(cell.named_parameters(recurse=False))
    if is_parametrized(cell) or any(name not in registered for name in names):
        return "its weights are parametrized"
    own = (nn.RNNCell.forward, nn.LSTMCell.forward, nn.GRUCell.forward)
    if type(cell).forward not in own or "forward" in vars(cell):
        return "its forward is not torch's own"
    return ""


def _chains(calls: list[CellCall]) -> list[list[CellCall]]:
    """Sequences of calls; where two continue the same one, the second begins a sequence."""
    chains: list[list[CellCall]] = []
    ends: dict[int, list[CellCall]] = {}  # by the number of the last call of each
    for call in calls:
        chain = ends.pop(call.before, None) if call.before is not None else None
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(call)
        ends[call.number] = chain
    return chains


def _returned_norm(call: CellCall) -> Tensor | None:
    return call.returned_norms.get(0)


def _input_norm(call: CellCall) -> Tensor | None:
    return call.input_norms


def _over(chains: list[list[CellCall]], rows: list[list[Tensor | None]]) -> Tensor:
    """(T, B) norms of all chains, 0 where there is none."""
    parts = []
    for chain, norms in zip(chains, rows, strict=True):
        known = [row_B for row_B in norms if row_B is not None]
        # A call is known from the first gradient of either side.
        either = [*known, chain[0].input_norms, *chain[0].returned_norms.values()]
        like = next(row_B for row_B in either if row_B is not None)
        widest = max((len(row_B) for row_B in known), default=len(like))
        filled = [torch.zeros_like(like) if row_B is None else row_B for row_B in norms]
        parts.append(torch.stack([pad(row_B, (0, widest - len(row_B))) for row_B in filled]))
    return stacked(parts)


def _step_back(cell: Cell, chain: list[CellCall]) -> tuple[Tensor, Tensor, Tensor]:
    """(S, R) norms of each state's adjoint and of what it sends back; whether a replay differs."""
    # The first call may have been given no state.
    steps = _Steps(cell, chain[1:])
    launched = steps.launched()
    size = max(1, min(len(steps.x_TRI), _CHUNK_ELEMENTS // steps.states[0][0].numel()))
    recurrence = _recurrence(cell, steps, launched, size)
    arriving, transported, again = [], [], []
    cell_carry_RH = torch.zeros_like(steps.first[-1])
    for start in reversed(range(0, len(steps.x_TRI), size)):
        now = slice(start, start + size)
        stop = min(now.stop, len(steps.x_TRI))
        chunk = recurrence.backward(start, stop, launched[0][now].unsqueeze(1))
        arrives, sent = feature_norms(chunk.hidden_TSBP[:, 0]), feature_norms(chunk.sent_TSBP[:, 0])
        if chunk.cell_sent_TSBH is not None:
            sent_TRH = chunk.cell_sent_TSBH[:, 0]
            cell_TRH = torch.cat([sent_TRH[1:], cell_carry_RH.unsqueeze(0)]) + launched[1][now]
            arrives = torch.hypot(arrives, feature_norms(cell_TRH))
            sent, cell_carry_RH = torch.hypot(sent, feature_norms(sent_TRH)), sent_TRH[0]
        arriving.append(arrives)
        transported.append(sent)
        again.append(chunk.again_TBP)
    differs = steps.differs(torch.cat(again[::-1]))
    return torch.cat(arriving[::-1]), torch.cat(transported[::-1]), differs


class _Steps:
    """The calls of a chain as one sequence, of which the batch is filled up where it shrinks.

    Attributes:
        x_TRI: Their inputs.
        states: (T, R, H) what they returned, h or h and c.
        grads: The gradients of that.
        first: The states that the first one was given.
        weights: Of the cell.
    """

    def __init__(self, cell: Cell, calls: list[CellCall]) -> None:
        # bfloat16 and float16 would add their own error at every step.
        self._dtype = torch.promote_types(cell.weight_hh.dtype, torch.float32)
        self._calls = calls
        self._sizes = [len(call.returned_RH[0]) for call in calls]
        which = range(len(calls[0].returned_RH))
        zero = torch.zeros_like
        self.x_TRI = self._filled([call.x_RI for call in calls if call.x_RI is not None])
        self.states = [self._filled([call.returned_RH[w] for call in calls]) for w in which]
        self.grads = [
            self._filled([call.grads_RH.get(w, zero(call.returned_RH[w])) for call in calls])
            for w in which
        ]
        self.first = [self._filled([state])[0] for state in calls[0].states_RH]
        none = cell.weight_hh.new_zeros(())
        biases = (cell.bias_ih, cell.bias_hh) if cell.bias else (none, none)
        parts = (cell.weight_ih, cell.weight_hh, *biases)
        self.weights = Weights(*(part.detach().to(self._dtype) for part in parts))

    def _filled(self, parts: list[Tensor]) -> Tensor:
        rows = max(self._sizes)
        return torch.stack([pad(part, (0, 0, 0, rows - len(part))) for part in parts]).to(
            self._dtype
        )

    def launched(self) -> list[Tensor]:
        """The last gradient that enters each sequence: followed back, it shows the way's gain."""
        grads = list(self.grads)
        if any(call.through_hidden for call in self._calls):
            w = self.weights
            before_TRH = torch.cat([self.first[0].unsqueeze(0), self.states[0][:-1]])
            gates_TRG = self.x_TRI @ w.ih.T + before_TRH @ w.hh.T + (w.bias_ih + w.bias_hh)
            o_TRH = gates_TRG.chunk(4, -1)[3].sigmoid()
            through_TRH = grads[0] * o_TRH * (1 - self.states[1].tanh().square())
            grads[1] = grads[1] - through_TRH
        enters_TR = torch.stack([(grad != 0).any(-1) for grad in grads]).any(0)
        later_TR = enters_TR.flip(0).cumsum(0).flip(0) - enters_TR.long()
        last_TR1 = (enters_TR & (later_TR == 0)).unsqueeze(-1)
        return [torch.where(last_TR1, grad, 0.0) for grad in grads]

    def differs(self, again_TRH: Tensor) -> Tensor:
        """Whether calls returned something else than what is now computed from their arguments."""
        once_TRH = self.states[0]
        apart_TR = (again_TRH - once_TRH).abs().amax(-1)
        if min(self._sizes) < apart_TR.shape[1]:
            sizes_T1 = torch.tensor(self._sizes, device=apart_TR.device).unsqueeze(-1)
            filled_TR = torch.arange(apart_TR.shape[1], device=apart_TR.device) >= sizes_T1
            apart_TR = apart_TR.masked_fill(filled_TR, 0.0)
        largest = once_TRH.nan_to_num(posinf=0.0, neginf=0.0).abs().amax().clamp(min=1e-3)
        return ~(apart_TR.amax() <= _REPLAY_TOLERANCE[self._calls[0].dtype] * largest)


def _recurrence(cell: Cell, steps: _Steps, launched: list[Tensor], chunk: int) -> Recurrence:
    known = (steps.weights, steps.x_TRI, steps.states[0], steps.first[0], 1)
    if isinstance(cell, nn.GRUCell):
        return GRURecurrence(*known)
    if isinstance(cell, nn.RNNCell):
        return ElmanRecurrence(*known, relu=cell.nonlinearity == "relu")
    return LSTMRecurrence(*known, c0_BH=steps.first[1], chunk=chunk, direct_cell_TBH=launched[1])


def _causes(cell: Cell, chains: list[list[CellCall]]) -> dict[str, Tensor]:
    calls = [call for chain in chains for call in chain if call.states_RH]
    x = torch.cat([call.x_RI for call in calls if call.x_RI is not None]).to(cell.weight_ih.dtype)
    h = torch.cat([call.states_RH[0] for call in calls]).to(cell.weight_hh.dtype)
    gates = x @ cell.weight_ih.T + h @ cell.weight_hh.T
    if cell.bias:
        gates = gates + cell.bias_ih + cell.bias_hh
    if not isinstance(cell, nn.RNNCell):
        name = "forget_gate" if isinstance(cell, nn.LSTMCell) else "update_gate"
        return {name: gates.chunk(4 if name == "forget_gate" else 3, -1)[1].sigmoid().mean()}
    slope = (gates > 0).to(gates.dtype) if cell.nonlinearity == "relu" else 1 - gates.tanh() ** 2
    return {"activation_slope": slope.mean(), "spectral_radius": spectral_radius(cell.weight_hh)}
