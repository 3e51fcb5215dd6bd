"""The reference is right: its outputs and gradients are the modules' own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

from tests.measure.recurrent_cases import KINDS, Built, Case, cases
from tests.measure.recurrent_reference import batched, recurrent_reference, time_major

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def loss_of(built: Built, output: Tensor | PackedSequence, state: Tensor | tuple) -> Tensor:
    """What the given gradients are the gradients of, from what the module itself returned."""
    ends = dict(
        zip(["grad_hn", "grad_cn"], [state] if torch.is_tensor(state) else state, strict=False)
    )
    loss = torch.zeros((), dtype=torch.float64)
    for name, grad in built.grads.items():
        if name == "grad_output":
            loss = loss + (time_major(built.rnn, output) * time_major(built.rnn, grad)).sum()
        else:
            loss = loss + (ends[name] * grad).sum()
    return loss


def with_grad(value: Tensor | PackedSequence) -> tuple[Tensor | PackedSequence, Tensor]:
    if isinstance(value, PackedSequence):
        data = value.data.clone().requires_grad_()
        return value._replace(data=data), data
    leaf = value.clone().requires_grad_()
    return leaf, leaf


@settings(max_examples=50, derandomize=True)
@given(cases())
def test_outputs_and_gradients_are_the_modules(case: Case) -> None:
    built = replace(case, dtype=torch.float64).build()
    value, leaf = with_grad(built.input)
    output, state = built.rnn(value, built.hx)
    loss = loss_of(built, output, state)
    weights = list(built.rnn.parameters())
    grads = torch.autograd.grad(loss, [leaf, *weights], materialize_grads=True)
    ours = recurrent_reference(built.rnn, built.input, built.hx, **built.grads)

    assert_close(ours.output, time_major(built.rnn, output).detach(), **EXACT)
    states = (state,) if torch.is_tensor(state) else state
    for own, theirs in zip((ours.h_n, ours.c_n), states, strict=False):
        assert_close(own, batched(theirs).detach(), **EXACT)
    theirs = grads[0]
    if isinstance(value, PackedSequence):
        theirs = value._replace(data=grads[0])
    assert_close(ours.input, time_major(built.rnn, theirs), **EXACT)
    twins = torch.autograd.grad(ours.loss, weights, materialize_grads=True)
    for twin, theirs in zip(twins, grads[1:], strict=True):
        assert_close(twin, theirs, **EXACT)


CELLS = {"tanh": nn.RNNCell, "relu": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_a_cell_in_a_loop(kind: str) -> None:
    built = Case(kind=kind, lengths=(9, 9)).build()
    options = {} if kind in {"lstm", "gru"} else {"nonlinearity": kind}
    cell = CELLS[kind](3, 5, **options, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in built.rnn.state_dict().items()})
    state, states = None, []
    for x_BI in built.input:
        state = cell(x_BI, state)
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            part.retain_grad()
        states.append(parts)
    torch.stack([parts[0] for parts in states]).backward(built.grads["grad_output"])
    ours = recurrent_reference(built.rnn, built.input, **built.grads)
    for t, parts in enumerate(states):
        assert_close(ours.hidden[0, t], parts[0].grad, **EXACT)
        if ours.cell is not None:
            assert_close(ours.cell[0, t], parts[1].grad, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [("grad_hn",), ("grad_hn", "grad_cn")])
def test_transport_telescopes_where_the_loss_enters_at_the_end(
    kind: str, given: tuple[str, ...]
) -> None:
    """What is transported over one boundary is all that arrives at the next."""
    case = Case(kind=kind, lengths=(9, 4, 1), layout="packed", bidirectional=True)
    built = replace(case, given=given if kind == "lstm" else given[:1]).build()
    ours = recurrent_reference(built.rnn, built.input, **built.grads)
    for b, length in enumerate(case.lengths):
        live = slice(0, length - 1)
        forward, reverse = ours.transported[:, live, b]
        assert_close(forward[1:], ours.arriving[0, live, b][:-1], **EXACT)
        assert_close(reverse[:-1], ours.arriving[1, live, b][1:], **EXACT)
