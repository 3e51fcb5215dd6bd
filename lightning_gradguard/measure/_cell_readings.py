"""The reading of a cell from the chain of its calls.

The adjoint of the last state of a sequence is taken back through one call after the other, by the
cell's own vector-Jacobian product. The gradients that hooks see on the way would not do: what they
hold of the loss at each timestep is new, and does not decay as what has come a long way.

Shape suffixes: ``T`` time (calls of a chain), ``B`` batch, ``S`` boundaries between timesteps,
``R`` those sequences of the batch that were kept, ``H`` hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_gradguard.measure._capture import special_weights
from lightning_gradguard.measure._cells import Cell, CellCall, CellWatch, weight_versions
from lightning_gradguard.measure._drafts import Draft, decay_numbers, doubts, reached, stacked
from lightning_gradguard.measure._taps import feature_norms
from lightning_gradguard.measure.decay import bin_profile, float_floor, recency, transport_decay
from lightning_gradguard.measure.spectral import spectral_radius
from lightning_gradguard.readings import TimeReading

_NO_CHAIN = "no call of it was given the state that another call had returned"


def cell_drafts(watch: CellWatch) -> list[Draft]:
    """The reading of all calls of a cell."""
    chains = _chains(sorted(watch.calls, key=lambda call: call.number))
    if not chains:
        return []
    cell = watch.cell
    reading = TimeReading(watch.name, "", "exact", _kind(cell))
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
    why_not = special_weights(cell)
    if not why_not and weight_versions(cell) != watch.versions:
        why_not = "its weights changed between the forward pass and the measurement"
    if why_not:
        note = f"not measured exactly: {why_not}"
        return [replace(draft, reading=replace(reading, note=note))]
    arriving_SR, transported_SR = _transport(cell, chains)
    floor = float_floor(chains[-1][-1].x_RI.dtype, cell.hidden_size)
    decay = transport_decay(arriving_SR, transported_SR, floor)
    return [
        replace(
            draft,
            reading=replace(reading, sequences=arriving_SR.shape[1]),
            numbers={**decay_numbers(decay), **draft.numbers},
            causes=_causes(cell, chains),
        )
    ]


def _kind(cell: Cell) -> str:
    if isinstance(cell, nn.RNNCell):
        return str(cell.nonlinearity)
    return "lstm" if isinstance(cell, nn.LSTMCell) else "gru"


def _chains(calls: list[CellCall]) -> list[list[CellCall]]:
    chains: list[list[CellCall]] = []
    for call in calls:
        if call.starts or not chains:
            chains.append([])
        chains[-1].append(call)
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
        like = known[0] if known else chain[0].x_RI.new_zeros(len(chain[0].x_RI))
        widest = max((len(row_B) for row_B in known), default=len(like))
        filled = [torch.zeros_like(like) if row_B is None else row_B for row_B in norms]
        parts.append(torch.stack([pad(row_B, (0, widest - len(row_B))) for row_B in filled]))
    return stacked(parts)


def _transport(cell: Cell, chains: list[list[CellCall]]) -> tuple[Tensor, Tensor]:
    """(S, R) norms of the adjoint of each state, and of what of it reaches the state before."""
    arriving, transported = [], []
    for chain in chains:
        sides = [_step_back(cell, chain)] if len(chain) > 1 else []
        arriving += [side[0] for side in sides]
        transported += [side[1] for side in sides]
    return stacked(arriving), stacked(transported)


def _step_back(cell: Cell, chain: list[CellCall]) -> tuple[Tensor, Tensor]:
    widest = max(len(call.x_RI) for call in chain)
    carry: tuple[Tensor, ...] = ()
    begun_R1 = torch.zeros((widest, 1), dtype=torch.bool, device=chain[0].x_RI.device)
    arriving, transported = [], []
    for call in reversed(chain[1:]):
        adjoint, carry = _through_call(cell, call, carry, begun_R1)
        begun_R1 = begun_R1 | pad(_any(adjoint), (0, 0, 0, widest - len(adjoint[0])))
        arriving.append(_joint_norm(adjoint, widest))
        transported.append(_joint_norm(carry, widest))
    return torch.stack(arriving[::-1]), torch.stack(transported[::-1])


def _through_call(
    cell: Cell, call: CellCall, carry: tuple[Tensor, ...], begun_R1: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The adjoint of the state that a call returned, and what of it reaches the one it was given.

    ``carry`` comes from later calls, empty if there are none; ``begun_R1``: in which sequences.
    """
    dtype = cell.weight_hh.dtype
    device = call.x_RI.device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        given = tuple(state.to(dtype).requires_grad_() for state in call.states_RH)
        hx = given if isinstance(cell, nn.LSTMCell) else given[0]
        # Not through the module's call, whose hooks would see it.
        output = cell.forward(call.x_RI.to(dtype), hx)  # type: ignore[arg-type]
        returned = output if isinstance(output, tuple) else (output,)
        new = [
            call.grads_RH.get(which, torch.zeros_like(state)).to(dtype)
            for which, state in enumerate(returned)
        ]
        if 1 in call.grads_RH:
            # What its hook saw includes what comes through h, if the kernel is not a fused one.
            new[1] = new[1] - _through_hidden(returned[0], returned[-1], new[0])
        adjoint = _launched(tuple(new), carry, begun_R1)
        return adjoint, torch.autograd.grad(returned, given, adjoint)


def _through_hidden(hidden: Tensor, state: Tensor, grad: Tensor) -> Tensor:
    """What of the gradient of h reaches c inside the cell, where c is a node of the graph."""
    (through,) = torch.autograd.grad(hidden, state, grad, retain_graph=True, materialize_grads=True)
    return through


def _launched(
    new: tuple[Tensor, ...], carry: tuple[Tensor, ...], begun_R1: Tensor
) -> tuple[Tensor, ...]:
    """What comes from later calls, and in sequences where none does yet, what is new."""
    if not carry:
        return new
    size = len(new[0])  # of a batch that may shrink as its sequences end
    carry = tuple(pad(part[:size], (0, 0, 0, size - len(part[:size]))) for part in carry)
    return tuple(torch.where(begun_R1[:size], old, n) for old, n in zip(carry, new, strict=True))


def _any(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(part != 0).any(-1, keepdim=True) for part in parts]).any(0)


def _joint_norm(parts: tuple[Tensor, ...], size: int) -> Tensor:
    norms = [feature_norms(part) for part in parts]
    norm_R = norms[0] if len(norms) == 1 else torch.hypot(*norms)
    return pad(norm_R, (0, size - len(norm_R)))


def _causes(cell: Cell, chains: list[list[CellCall]]) -> dict[str, Tensor]:
    calls = [call for chain in chains for call in chain if call.states_RH]
    x = torch.cat([call.x_RI for call in calls]).to(cell.weight_ih.dtype)
    h = torch.cat([call.states_RH[0] for call in calls]).to(cell.weight_hh.dtype)
    gates = x @ cell.weight_ih.T + h @ cell.weight_hh.T
    if cell.bias:
        gates = gates + cell.bias_ih + cell.bias_hh
    if not isinstance(cell, nn.RNNCell):
        name = "forget_gate" if isinstance(cell, nn.LSTMCell) else "update_gate"
        return {name: gates.chunk(4 if name == "forget_gate" else 3, -1)[1].sigmoid().mean()}
    slope = (gates > 0).to(gates.dtype) if cell.nonlinearity == "relu" else 1 - gates.tanh() ** 2
    return {"activation_slope": slope.mean(), "spectral_radius": spectral_radius(cell.weight_hh)}
