"""The pull on the transport gain: what it adds, how much at most, and that it helps."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradguard import GuardEngine
from lightning_gradguard.measure import recurrent_adjoint
from lightning_gradguard.respond import VanishingRegularizer, vanishing_response
from lightning_gradguard.respond.vanishing_regularizer import Regularization, add_bounded
from tests.measure.recurrent_cases import Case
from tests.measure.test_transport import backward, gradients
from tests.measure.transport_twin import omega_twin

BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": 0.0}, ValueError, "weight must be a number > 0"),
    ({"weight": math.inf}, ValueError, "weight must be"),
    ({"weight": "1"}, TypeError, "weight must be a number"),
    ({"every_n_steps": 0}, ValueError, "every_n_steps must be an integer >= 1"),
    ({"max_ratio": -1.0}, ValueError, "max_ratio must be a number > 0"),
    ({"one_sided": 1}, TypeError, "one_sided must be True or False"),
    ({"modules": "rnn"}, ValueError, "modules must be 'auto' or a sequence of names, got 'rnn'"),
    ({"modules": {"rnn": 0}}, TypeError, "modules must be 'auto' or a sequence of names"),
    ({"modules": [1]}, TypeError, "a name in modules must be a string"),
]


class Tagger(nn.Module):
    """Says from the last state of a recurrent module whether the first input was positive."""

    def __init__(self, kind: type[nn.Module] = nn.RNN, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rnn = kind(2, 24, **options)
        self.head = nn.Linear(24, 1)

    def forward(self, x_TBI: Tensor) -> Tensor:
        return self.head(self.rnn(x_TBI)[0][-1]).squeeze(-1)

    def loss(self, x_TBI: Tensor) -> Tensor:
        wanted = (x_TBI[0, :, 0] > 0).float()
        return nn.functional.binary_cross_entropy_with_logits(self(x_TBI), wanted)


def batches(count: int, steps: int = 30, size: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(steps, size, 2, generator=generator) for _ in range(count)]


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def gain_of(model: Tagger, x_TBI: Tensor) -> float:
    """The mean ρ, by the measurement."""
    output = model.rnn(x_TBI)[0].detach().requires_grad_()
    logits = model.head(output[-1]).squeeze(-1)
    wanted = (x_TBI[0, :, 0] > 0).float()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, wanted)
    (grad,) = torch.autograd.grad(loss, output)
    return recurrent_adjoint(model.rnn, x_TBI, grad_output=grad).gain.nanmean().item()


def grads_of(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def added_by(settings: VanishingRegularizer, *, scale: float = 1.0) -> list[Tensor]:
    """What is added to each gradient, divided by the scale again."""
    model, (x,) = Tagger(), batches(1)
    pull = Regularization(settings, model, parameters_of(model))
    (model.loss(x) * scale).backward()
    before = grads_of(model)
    pull.add_gradient(0, scale)
    pull.close()
    return [(a - b) / scale for a, b in zip(grads_of(model), before, strict=True)]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        VanishingRegularizer(**arguments)


def test_a_name_that_the_model_does_not_have_is_refused() -> None:
    settings = VanishingRegularizer(modules=["encoder"])
    model = Tagger()
    with pytest.raises(ValueError, match="matches none"):
        settings.check(model)
    with pytest.raises(ValueError, match="matches none"):
        GuardEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), vanishing=settings)
    VanishingRegularizer(modules=["rn*"]).check(model)
    assert not model.rnn._forward_hooks


@pytest.mark.parametrize("kind", ["tanh", "relu", "lstm", "gru"])
def test_what_is_added_is_the_gradient_of_omega(kind: str) -> None:
    built = Case(kind, num_layers=2).build()
    settings = VanishingRegularizer(weight=0.25, max_ratio=1e9)
    pull = Regularization(settings, built.rnn, parameters_of(built.rnn))
    backward(built)
    before = grads_of(built.rnn)
    pull.add_gradient(0, 1.0)
    pull.close()
    twin = gradients(omega_twin(built), built.rnn)
    for now, then, expected in zip(grads_of(built.rnn), before, twin, strict=True):
        torch.testing.assert_close(now - then, 0.25 * expected, rtol=1e-6, atol=1e-9)


def test_several_backward_passes_before_a_step_count_as_one_larger_batch_of_steps() -> None:
    model, (x, y) = Tagger(), batches(2)
    pull = Regularization(VanishingRegularizer(max_ratio=1e9), model, parameters_of(model))
    added = []
    for calls in ([x], [y], [x, y]):
        model.zero_grad()
        for batch in calls:
            model.loss(batch).backward()
        before = grads_of(model)
        pull.add_gradient(0, 1.0)
        added.append([a - b for a, b in zip(grads_of(model), before, strict=True)])
    pull.close()
    for one, other, both in zip(*added, strict=True):
        torch.testing.assert_close(both, (one + other) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_ratio", [1e9, 1.0, 0.01])
def test_under_a_gradient_scaler_it_is_in_the_units_of_the_gradients(max_ratio: float) -> None:
    settings = VanishingRegularizer(max_ratio=max_ratio)
    for plain, scaled in zip(added_by(settings), added_by(settings, scale=2.0**12), strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-7)


sizes = st.floats(1e-12, 1e12)


@given(have=sizes, add=sizes, weight=st.floats(1e-6, 1e6), max_ratio=st.floats(1e-3, 10.0))
def test_what_is_added_stays_within_its_share(
    have: float, add: float, weight: float, max_ratio: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(20, generator=generator, dtype=torch.float64) * have
    added = torch.randn(20, generator=generator, dtype=torch.float64) * add
    after = before.clone()
    add_bounded([after], [added], weight, max_ratio)
    moved = (after - before).norm().item()
    assert moved <= max_ratio * before.norm().item() * (1.0 + 1e-5)
    assert moved <= weight * added.norm().item() * (1.0 + 1e-5) + 1e-12 * before.norm().item()
    # At least one of the two bounds is reached.
    reached = min(max_ratio * before.norm().item(), weight * added.norm().item())
    assert moved >= reached * (1.0 - 1e-5) - 1e-12 * before.norm().item()


@pytest.mark.parametrize("have", [0.0, math.nan, math.inf])
def test_nothing_is_added_to_a_gradient_without_a_norm(have: float) -> None:
    gradient = torch.full((3,), have)
    add_bounded([gradient], [torch.ones(3)], 1.0, 1.0)
    assert torch.equal(gradient.nan_to_num(7.0), torch.full((3,), have).nan_to_num(7.0))


def test_nothing_is_added_that_is_not_finite() -> None:
    gradients = [torch.ones(3), torch.ones(3)]
    add_bounded(gradients, [torch.tensor([math.nan, 0.0, 1.0]), torch.ones(3)], 1.0, 0.5)
    assert gradients[0].tolist() == [1.0, 1.0, 1.0]
    assert gradients[1].tolist() == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_gain_moves_toward_one(kind: type[nn.Module]) -> None:
    data = batches(50)
    gains = {}
    for vanishing in (None, VanishingRegularizer(weight=1.0)):
        model = Tagger(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        guard = GuardEngine(model, optimizer, vanishing=vanishing)
        begin = gain_of(model, data[0])
        for x in data:
            optimizer.zero_grad()
            loss = model.loss(x)
            loss.backward()
            guard.before_step(loss)
            optimizer.step()
        guard.close()
        gains[vanishing] = begin, gain_of(model, data[0])
    (begin, without), (_, regularized) = gains.values()
    assert begin < 0.8
    assert abs(regularized - 1.0) < 0.8 * abs(begin - 1.0)
    assert abs(regularized - 1.0) < 0.8 * abs(without - 1.0)


def test_it_acts_on_each_nth_step_and_sleeps_on_the_others() -> None:
    model, data = Tagger(), batches(7)
    settings = VanishingRegularizer(every_n_steps=3)
    pull = Regularization(settings, model, parameters_of(model))
    acted = []
    for step, x in enumerate(data):
        model.zero_grad()
        model.loss(x).backward()
        before = grads_of(model)
        pull.add_gradient(step, 1.0)
        pairs = zip(grads_of(model), before, strict=True)
        acted.append(not all(torch.equal(a, b) for a, b in pairs))
    pull.close()
    assert acted == [True, False, False, True, False, False, True]


def test_passes_of_evaluation_are_not_seen() -> None:
    model, (x, y) = Tagger(), batches(2)
    pull = Regularization(VanishingRegularizer(), model, parameters_of(model))
    pull.pause()
    model.loss(y).backward()
    pull.resume()
    before = grads_of(model)
    pull.add_gradient(0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(grads_of(model), before, strict=True))
    model.loss(x).backward()
    before = grads_of(model)
    pull.add_gradient(1, 1.0)
    assert not all(torch.equal(a, b) for a, b in zip(grads_of(model), before, strict=True))
    pull.close()


def test_parameters_that_are_frozen_or_of_another_optimizer_get_nothing() -> None:
    model, (x,) = Tagger(), batches(1)
    model.rnn.weight_ih_l0.requires_grad_(False)
    own = [model.rnn.weight_hh_l0]
    pull = Regularization(VanishingRegularizer(), model, own)
    model.loss(x).backward()
    before = grads_of(model)
    pull.add_gradient(0, 1.0)
    pull.close()
    names = [name for name, _ in model.named_parameters()]
    pairs = zip(names, grads_of(model), before, strict=True)
    assert [name for name, now, then in pairs if not torch.equal(now, then)] == ["rnn.weight_hh_l0"]
    assert model.rnn.weight_ih_l0.grad is None


def test_an_error_inside_is_contained_and_takes_the_hooks_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, (x,) = Tagger(), batches(1)
    pull = Regularization(VanishingRegularizer(), model, parameters_of(model))
    monkeypatch.setattr(pull._probe, "collect", lambda: 1 / 0)
    model.loss(x).backward()
    before = grads_of(model)
    pull.add_gradient(0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(grads_of(model), before, strict=True))
    assert "stops adding the regularizer" in caplog.text
    assert not model.rnn._forward_hooks
    assert not model.rnn._forward_pre_hooks
    pull.resume()
    assert not pull._probe.watching


def test_what_is_left_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    pull = Regularization(VanishingRegularizer(), model, parameters_of(model))
    pull.follow(parameters_of(model))
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert said == [
        "VanishingRegularizer leaves out all: no nn.RNN, nn.LSTM or nn.GRU is trained here."
    ]


def test_a_run_of_several_processes_goes_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vanishing_response, "_processes", lambda: 2)
    model = Tagger()
    response = vanishing_response.VanishingResponse(model, VanishingRegularizer(), None)
    response.follow(*zip(*model.named_parameters(), strict=True))
    assert "left out: in a run of several processes" in caplog.text
    assert not model.rnn._forward_hooks


@settings(max_examples=10, deadline=None)
@given(max_ratio=st.floats(0.01, 2.0), weight=st.floats(0.1, 1e3))
def test_the_bound_holds_for_every_parameter_of_a_module(max_ratio: float, weight: float) -> None:
    added = added_by(VanishingRegularizer(weight=weight, max_ratio=max_ratio))
    model, (x,) = Tagger(), batches(1)
    model.loss(x).backward()
    for extra, before in zip(added, grads_of(model), strict=True):
        assert extra.norm() <= max_ratio * before.norm() * (1.0 + 1e-3) + 1e-9
