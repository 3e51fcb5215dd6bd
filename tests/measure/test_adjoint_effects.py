"""Nothing but the result: what is left as found, and where values that are not finite go."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from lightning_gradguard.measure.adjoint import recurrent_adjoint
from tests.measure.recurrent_cases import KINDS, Case
from tests.measure.recurrent_twin import TENSORS, adjoint_of, assert_twin, reference_of


@pytest.mark.parametrize("layout", ["padded", "packed unsorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_altered(kind: str, layout: str) -> None:
    case = Case(kind=kind, num_layers=2, dropout=0.5, hx=True, layout=layout, lengths=(3, 5))
    built = replace(case, lengths=(5, 5) if layout == "padded" else (3, 5)).build()
    data = built.input.data.requires_grad_()
    value = built.input._replace(data=data) if "packed" in layout else data
    parameters = list(built.rnn.parameters())
    parameters[0].requires_grad_(requires_grad=False)
    for parameter in parameters[1:]:
        parameter.grad = torch.randn_like(parameter)
    state = torch.get_rng_state()
    output = built.rnn(value, built.hx)[0]
    fixed = [*parameters, data, *([built.hx] if torch.is_tensor(built.hx) else built.hx)]
    before = [(p.detach().clone(), p.grad, p.requires_grad, p._version) for p in fixed]
    grads = [p.grad.clone() for p in parameters[1:]]
    torch.rand(3)  # or the state after drawing the masks again would be this one anyway
    now = torch.get_rng_state()
    ours = recurrent_adjoint(
        built.rnn, value, built.hx, **built.grads, output=output, rng_state=state
    )
    assert torch.equal(torch.get_rng_state(), now)
    assert built.rnn.training
    assert torch.is_grad_enabled()
    assert next(built.rnn.parameters()) is parameters[0]
    for tensor, (values, grad, requires_grad, version) in zip(fixed, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor.grad is grad
        assert tensor.requires_grad == requires_grad
        assert tensor._version == version
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters[1:], grads, strict=True))
    assert data.grad is None
    for name in TENSORS:
        result = getattr(ours, name)
        assert result is None or not result.requires_grad


def test_hooks_on_the_module_do_not_fire() -> None:
    built = Case().build()
    calls: list[str] = []
    built.rnn.register_forward_hook(lambda *_: calls.append("forward"))
    built.rnn.register_forward_pre_hook(lambda *_: calls.append("before"))
    for parameter in built.rnn.parameters():
        parameter.register_hook(lambda _: calls.append("backward"))
    adjoint_of(built)
    assert calls == []


@pytest.mark.parametrize("kind", KINDS)
def test_works_where_autograd_is_off(kind: str) -> None:
    built = Case(kind=kind, num_layers=2).build()
    theirs = reference_of(built)
    with torch.no_grad():
        assert_twin(adjoint_of(built), theirs, 1e-10)
    with torch.inference_mode():
        ours = adjoint_of(built)
    assert_twin(ours, theirs, 1e-10)


@pytest.mark.parametrize("where", ["input", "grad_output", "hx"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_sequence(kind: str, value: float, where: str) -> None:
    case = Case(kind=kind, num_layers=2, bidirectional=True, lengths=(6,) * 4, hx=True)
    built, clean = case.build(), case.build()
    if where == "hx":
        hx = built.hx if torch.is_tensor(built.hx) else built.hx[0]
        hx[:, 2] = value
    else:
        {"input": built.input, **built.grads}[where][3, 2] = value
    output = built.rnn(built.input, built.hx)[0]
    ours, theirs = adjoint_of(built, output=output), adjoint_of(clean)
    others = [0, 1, 3]
    assert_close(ours.input[:, others], theirs.input[:, others])
    for name in ("hidden", "arriving", "transported", "input_norms"):
        assert_close(getattr(ours, name)[:, :, others], getattr(theirs, name)[:, :, others])
    expected = reference_of(built)
    for name in TENSORS:
        result, twin = getattr(ours, name), getattr(expected, name)
        if result is not None:
            assert not result[~twin.isfinite()].isfinite().any(), name
    assert not ours.input[:, 2].isfinite().all()


def exploding_rnn(dtype: torch.dtype = torch.float32) -> nn.RNN:
    rnn = nn.RNN(1, 4, nonlinearity="relu", bias=False, dtype=dtype)
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(1.0)
        rnn.weight_hh_l0.fill_(1.0)
    return rnn


def test_forward_that_overflows_is_not_taken_for_another_one() -> None:
    rnn, x = exploding_rnn(), torch.ones(100, 2, 1)
    output = rnn(x)[0]
    assert output[-1].isinf().all()
    ours = recurrent_adjoint(rnn, x, grad_output=torch.ones_like(output), output=output)
    assert not ours.input[0].isfinite().any()


@pytest.mark.parametrize("known", [False, True])
def test_padding_of_a_short_sequence_does_not_explode(known: bool) -> None:
    """The longer sequence stays at zero; the shorter one ends long before it would overflow."""
    rnn, x = exploding_rnn(torch.float64), -torch.ones(600, 2, 1, dtype=torch.float64)
    x[:, 1] = 1.0
    packed = pack_padded_sequence(x, torch.tensor([600, 5]))
    output = rnn(packed)[0]
    grad = output._replace(data=torch.ones_like(output.data))
    ours = recurrent_adjoint(rnn, packed, grad_output=grad, output=output if known else None)
    alone = recurrent_adjoint(rnn, x[:5, 1:], grad_output=torch.ones(5, 1, 4).double())
    assert_close(ours.input[:5, 1:], alone.input)
    assert_close(ours.hidden[:, :5, 1:], alone.hidden)
    assert not ours.hidden[:, 5:, 1].any()
