"""The transport gain as a function of the weights agrees with explicit Jacobians."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.measure.transport import TransportProbe
from lightning_gradguard.respond.vanishing_regularizer import omega
from tests.measure.recurrent_cases import KINDS, Built, Case, cases
from tests.measure.recurrent_twin import adjoint_of
from tests.measure.transport_twin import omega_twin


def data(value: Tensor | PackedSequence) -> Tensor:
    return value.data if isinstance(value, PackedSequence) else value


def backward(built: Built) -> None:
    """One call of the module, and a loss whose gradients are those of the case."""
    output, states = built.rnn(built.input, built.hx)
    states = states if isinstance(states, tuple) else (states,)
    pairs = [(data(output), built.grads.get("grad_output"))]
    pairs += zip(states, (built.grads.get("grad_hn"), built.grads.get("grad_cn")), strict=False)
    loss = sum((out * data(grad)).sum() for out, grad in pairs if grad is not None)
    built.rnn.zero_grad()
    loss.backward()


def steps_of(built: Built) -> list[Any]:
    probe = TransportProbe(built.rnn)
    backward(built)
    modules, reasons = probe.collect()
    probe.close()
    assert not reasons
    return next(iter(modules.values()))


def gradients(value: Tensor, rnn: nn.Module) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            value, list(rnn.parameters()), allow_unused=True, materialize_grads=True
        )
    )


def assert_twin(case: Case, *, one_sided: bool = False) -> None:
    built = case.build()
    steps = steps_of(built)
    if max(case.lengths) < 2:
        assert not steps  # nothing travels through one timestep
        return
    ours, theirs = omega(steps, one_sided=one_sided), omega_twin(built, one_sided=one_sided)
    assert abs(ours.item() - theirs.item()) <= 1e-9 * max(1.0, theirs.item())
    if not theirs.requires_grad:
        return
    pairs = zip(gradients(ours, built.rnn), gradients(theirs, built.rnn), strict=True)
    for mine, reference in pairs:
        torch.testing.assert_close(mine, reference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_omega_and_its_gradient_are_those_of_explicit_jacobians(kind: str, one_sided: bool) -> None:
    for case in (
        Case(kind),
        Case(kind, num_layers=2, bidirectional=True, batch_first=True, hx=True),
        Case(kind, layout="packed unsorted", lengths=(3, 7, 5), bidirectional=True),
        Case(kind, layout="unbatched", lengths=(6,), given=("grad_hn",)),
        Case(kind, bias=False, given=("grad_output", "grad_hn")),
    ):
        assert_twin(case, one_sided=one_sided)


def test_omega_of_an_lstm_knows_projections_and_gradients_of_the_last_cell_state() -> None:
    everything = ("grad_output", "grad_hn", "grad_cn")
    assert_twin(Case("lstm", proj_size=2, num_layers=2, given=everything))
    lengths = (5, 2, 4)
    assert_twin(Case("lstm", layout="packed unsorted", lengths=lengths, given=("grad_cn",)))


@settings(max_examples=20, deadline=None)
@given(cases())
def test_omega_is_that_of_its_twin_for_any_configuration(case: Case) -> None:
    assert_twin(replace(case, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_is_that_of_the_exact_measurement(kind: str) -> None:
    case = Case(kind, num_layers=2, bidirectional=True, layout="packed", lengths=(9, 6, 2))
    built = case.build()
    for one, expected in zip(steps_of(built), adjoint_of(built).gain, strict=True):
        torch.testing.assert_close(one.gain().detach(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-20, 2.0**16])
def test_the_scale_of_the_loss_changes_no_gain(kind: str, scale: float) -> None:
    plain = Case(kind, dtype=torch.float32).build()
    scaled = Case(kind, dtype=torch.float32).build()
    scaled.grads["grad_output"] *= scale
    before = [one.gain() for one in steps_of(plain)]
    after = [one.gain() for one in steps_of(scaled)]
    torch.testing.assert_close(before, after)


def test_where_nothing_arrives_there_is_no_gain_and_no_nan() -> None:
    built = Case("tanh", lengths=(8, 8)).build()
    built.grads["grad_output"][5:] = 0.0
    (one,) = steps_of(built)
    assert one.known_S.tolist() == [True] * 4 + [False] * 3
    assert one.gain()[4:].tolist() == [0.0, 0.0, 0.0]
    assert all(grad.isfinite().all() for grad in gradients(omega([one]), built.rnn))


def test_watching_changes_no_bit_and_leaves_no_hook() -> None:
    watched, plain = Case("gru").build(), Case("gru").build()
    probe = TransportProbe(watched.rnn)
    backward(watched)
    backward(plain)
    probe.collect()
    probe.close()
    pairs = zip(watched.rnn.parameters(), plain.rnn.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert not watched.rnn._forward_hooks
    assert not watched.rnn._forward_pre_hooks


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    rnn = nn.LSTM(4, 8)
    probe = TransportProbe(rnn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rnn(torch.randn(10, 3, 4))[0][-1].float().sum().backward()
        modules, reasons = probe.collect()
        assert not reasons
        value = omega(modules["LSTM"])
    assert value.dtype is torch.float32
    assert math.isfinite(value.item())
    probe.close()


def test_a_module_that_cannot_be_repeated_is_named_with_the_reason() -> None:
    rnn = nn.utils.parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    probe = TransportProbe(rnn)
    rnn(torch.randn(5, 2, 3))[0].sum().backward()
    modules, reasons = probe.collect()
    assert not any(modules.values())
    assert "parametrized" in next(iter(reasons.values()))
    probe.close()


def test_names_of_other_modules_are_refused() -> None:
    model = nn.ModuleDict({"rnn": nn.RNN(2, 3), "cell": nn.LSTMCell(2, 3)})
    with pytest.raises(ValueError, match="got 'cell', which is LSTMCell"):
        TransportProbe(model, ["cell"])
    with pytest.raises(ValueError, match="matches none"):
        TransportProbe(model, ["encoder"])
    with pytest.raises(TypeError, match="sequence of names"):
        TransportProbe(model, {"rnn": 0})  # type: ignore[arg-type]
    probe = TransportProbe(model)
    assert probe.names == ("rnn",)
    probe.close()
    assert not model["rnn"]._forward_hooks
