"""Recurrent layers with delays, by their equations: one sequence, one timestep at a time.

What a batch is and how it is laid out is decided here as well, for the tests of all such modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

KINDS = ("rnn", "gru", "lstm")
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
LAYOUTS = ("time first", "batch first", "unbatched", "packed")
I, H = 2, 3  # noqa: E741 - input

# x, all h so far, all c so far -> the next h and c
Equation = Callable[[Tensor, list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]
# layer, suffix of the direction -> its equation
EquationOf = Callable[[int, str], Equation]


@dataclass(frozen=True)
class Delays:
    """How many states of each part are carried on, of h and of c, and by which equations."""

    h: list[int]
    c: list[int]
    equation: EquationOf


def next_state(
    kind: str, w: Mapping[str, Tensor], x: Tensor, seen: list[Tensor], h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """``seen`` are the products of each gate with earlier states, summed up; ``h`` is mixed in."""

    def both(name: str) -> list[Tensor]:
        own = w.get(name)
        return [torch.zeros(H, dtype=x.dtype)] * GATES[kind] if own is None else list(own.split(H))

    fed = [W @ x + b for W, b in zip(w["weight_ih"].split(H), both("bias_ih"), strict=True)]
    back = [s + b for s, b in zip(seen, both("bias_hh"), strict=True)]
    if kind == "rnn":
        return torch.tanh(fed[0] + back[0]), c
    if kind == "gru":
        r, z = torch.sigmoid(fed[0] + back[0]), torch.sigmoid(fed[1] + back[1])
        return (1 - z) * torch.tanh(fed[2] + r * back[2]) + z * h, c
    i, f, g, o = (a + b for a, b in zip(fed, back, strict=True))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def run_loop(
    module: nn.Module, delays: Delays, sequences: list[Tensor], h: Tensor, c: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs of each sequence, and the last states, from those before, ``(…, B, H)``."""
    outputs, h_columns, c_columns = [], [], []
    for b, x in enumerate(sequences):
        h_parts, c_parts = h[:, b].split(delays.h), c[:, b].split(delays.c)
        h_ends, c_ends = [], []
        for layer in range(module.num_layers):
            made = []
            for suffix in ("", "_reverse")[: 1 + module.bidirectional]:
                hs, cs = list(h_parts[len(h_ends)]), list(c_parts[len(c_ends)])
                carried_h, carried_c = len(hs), len(cs)
                equation = delays.equation(layer, suffix)
                for x_t in x.flip(0) if suffix else x:
                    h_t, c_t = equation(x_t, hs, cs)
                    hs.append(h_t)
                    cs.append(c_t)
                output = torch.stack(hs[carried_h:])
                made.append(output.flip(0) if suffix else output)
                h_ends.append(torch.stack(hs[-carried_h:]))
                c_ends.append(torch.stack(cs[-carried_c:]))
            joined = torch.cat(made, 1)
            x = joined + x if module.residual and layer else joined
        outputs.append(x)
        h_columns.append(torch.cat(h_ends))
        c_columns.append(torch.cat(c_ends))
    return outputs, torch.stack(h_columns, 1), torch.stack(c_columns, 1)


def lengths_of(layout: str) -> st.SearchStrategy[list[int]]:
    """Lengths of sequences that can be laid out so."""
    if layout == "packed":
        return st.lists(st.integers(1, 7), min_size=1, max_size=4)
    batches = st.just(1) if layout == "unbatched" else st.integers(1, 3)
    return st.builds(lambda length, batch: [length] * batch, st.integers(1, 7), batches)


def laid_out(sequences: list[Tensor], layout: str) -> Tensor | PackedSequence:
    if layout == "packed":
        return pack_sequence(sequences, enforce_sorted=False)
    if layout == "unbatched":
        return sequences[0]
    return torch.stack(sequences, 0 if layout == "batch first" else 1)


def taken_apart(output: Tensor | PackedSequence, layout: str) -> list[Tensor]:
    if layout == "packed":
        padded, lengths = pad_packed_sequence(output, batch_first=True)
        return [row[:length] for row, length in zip(padded, lengths, strict=True)]
    if layout == "unbatched":
        return [output]
    return list(output.unbind(0 if layout == "batch first" else 1))


def states_as(states: list[Tensor], kind: str, layout: str) -> Tensor | tuple[Tensor, ...]:
    """h and c as a module takes them."""
    given = [s.squeeze(1) if layout == "unbatched" else s for s in states]
    return tuple(given) if kind == "lstm" else given[0]


def check_against_loop(
    module: nn.Module,
    kind: str,
    delays: Delays,
    lengths: list[int],
    layout: str,
    *,
    from_zero: bool = False,
    tolerance: float = 1e-10,
) -> None:
    """Outputs, last states, and the gradients of all of them by everything, are the loop's."""
    dtype = next(module.parameters()).dtype
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    batch = len(lengths)
    sequences = [draw(length, I).requires_grad_() for length in lengths]
    states = [draw(sum(d), batch, H) * (not from_zero) for d in (delays.h, delays.c)]
    states = [state.requires_grad_() for state in states[: 1 + (kind == "lstm")]]

    hx = None if from_zero else states_as(states, kind, layout)
    output, last = module(laid_out(sequences, layout), hx)
    last = list(last) if kind == "lstm" else [last]
    if layout == "unbatched":
        last = [state.unsqueeze(1) for state in last]
    actual = [*taken_apart(output, layout), *last]

    c = states[1] if kind == "lstm" else draw(sum(delays.c), batch, H)
    outputs, h_n, c_n = run_loop(module, delays, sequences, states[0], c)
    expected = [*outputs, h_n, *([c_n] if kind == "lstm" else [])]

    leaves = [*module.parameters(), *sequences, *([] if from_zero else states)]
    weights = [draw(*value.shape) for value in expected]
    by_actual = torch.autograd.grad(actual, leaves, weights, allow_unused=True)
    by_expected = torch.autograd.grad(expected, leaves, weights, allow_unused=True)
    for value, twin in zip([*actual, *by_actual], [*expected, *by_expected], strict=True):
        if value is None or twin is None:  # as of recurrent weights that saw only zeros
            assert value is twin is None or not (value if twin is None else twin).any()
            continue
        torch.testing.assert_close(value, twin, rtol=tolerance, atol=tolerance)
