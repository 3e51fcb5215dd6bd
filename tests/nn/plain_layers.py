"""Layers and directions the slow and obvious way: one sequence list, one timestep, one equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

Parameters = dict[str, Tensor]
# Parameters of a layer and direction, timestep, inputs and states of the rows that are alive.
Step = Callable[[Parameters, int, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]

FORMS = ("batched", "batch_first", "packed", "unbatched")


def parameters_of(module: nn.Module, layer: int, way: int) -> Parameters:
    """Parameters and buffers of a layer and direction, without its suffix."""
    suffix = f"_l{layer}" + ("_reverse" if way else "")
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name.removesuffix(suffix): tensor for name, tensor in named if name.endswith(suffix)}


def plain_layers(
    module: nn.Module, sequences: Sequence[Tensor], states: Sequence[Tensor], step: Step
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of each sequence and last states ``(K, B, H)``, from states ``(K, B, H)``."""
    ways = 2 if module.bidirectional else 1
    ends: list[list[Tensor]] = [[] for _ in states]
    for layer in range(module.num_layers):
        sides = []
        for way in range(ways):
            part = ways * layer + way
            given = [s.flip(0) if way else s for s in sequences]
            start = [tuple(state[part, b] for state in states) for b in range(len(given))]
            outputs, last = one_direction(parameters_of(module, layer, way), given, start, step)
            sides.append([o.flip(0) if way else o for o in outputs])
            for kind, end in enumerate(ends):
                end.append(torch.stack([row[kind] for row in last]))
        made = [torch.cat(both, -1) for both in zip(*sides, strict=True)]
        if module.residual and layer > 0:
            made = [new + old for new, old in zip(made, sequences, strict=True)]
        sequences = made
    return list(sequences), [torch.stack(end) for end in ends]


def one_direction(
    parameters: Parameters,
    sequences: Sequence[Tensor],
    states: list[tuple[Tensor, ...]],
    step: Step,
) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    for time in range(max(len(s) for s in sequences)):
        alive = [b for b, s in enumerate(sequences) if time < len(s)]
        rows = torch.stack([sequences[b][time] for b in alive])
        before = tuple(torch.stack(kind) for kind in zip(*(states[b] for b in alive), strict=True))
        after = step(parameters, time, rows, before)
        for row, b in enumerate(alive):
            states[b] = tuple(state[row] for state in after)
            outputs[b].append(states[b][0])
    return [torch.stack(o) for o in outputs], states


def called(
    module: nn.Module, form: str, sequences: Sequence[Tensor], states: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What the module itself makes of the same, given in one of the forms."""
    single = form == "unbatched"
    hx = tuple(state.squeeze(1) for state in states) if single else tuple(states)
    given: Tensor | PackedSequence
    if form == "packed":
        given = pack_sequence(list(sequences), enforce_sorted=False)
    elif single:
        (given,) = sequences
    else:
        given = torch.stack(list(sequences), 0 if form == "batch_first" else 1)
    output, last = module(given, hx if len(hx) > 1 else hx[0])
    last = last if isinstance(last, tuple) else (last,)
    if isinstance(output, PackedSequence):
        return unpack_sequence(output), list(last)
    if single:
        return [output], [state.unsqueeze(1) for state in last]
    return list(output.unbind(0 if form == "batch_first" else 1)), list(last)


def lengths_of(form: str) -> list[int]:
    """Lengths of the sequences that a form is tried with."""
    return {"packed": [3, 5, 1, 4, 4], "unbatched": [4]}.get(form, [4, 4, 4])


def drawn(module: nn.Module, lengths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences and a state for a module, as leaves."""
    dtype = next(module.parameters()).dtype
    parts = module.num_layers * (2 if module.bidirectional else 1)
    sequences = [torch.randn(n, module.input_size, dtype=dtype) for n in lengths]
    states = [
        torch.randn(parts, len(lengths), module.hidden_size, dtype=dtype)
        for _ in module.state_names
    ]
    return [s.requires_grad_() for s in sequences], [s.requires_grad_() for s in states]


def weighted_sum(outputs: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """A loss that weighs every number of an output differently."""
    total = torch.zeros((), dtype=outputs[0].dtype)
    for tensor in (*outputs, *states):
        weights = torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype)
        total = total + (weights * tensor.reshape(-1)).sum() + tensor.square().sum()
    return total


def assert_as_plain(module: nn.Module, form: str, step: Step, lengths: list[int]) -> None:
    """Compare outputs, states, and the gradients of everything, to 1e-10."""
    sequences, states = drawn(module, lengths)
    leaves = [*sequences, *states, *module.parameters()]
    results = []
    for outputs, last in (
        called(module, form, sequences, states),
        plain_layers(module, sequences, states, step),
    ):
        gradients = torch.autograd.grad(weighted_sum(outputs, last), leaves)
        results.append([*outputs, *last, *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
