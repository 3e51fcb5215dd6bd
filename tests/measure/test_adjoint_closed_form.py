"""Gradients through time whose decay is known beforehand."""

from __future__ import annotations

import argparse
import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.measure.adjoint import RecurrentAdjoint, recurrent_adjoint
from lightning_gradguard.readings import TimeReading


def decay_rate(adjoint: RecurrentAdjoint, k: int = 0) -> float:
    return adjoint.gain[k].log().mean().item()


def linear_rnn(a: float, *, bidirectional: bool) -> tuple[nn.RNN, Tensor]:
    """ReLU units that are never off, W = a·Q, and the state that they stay near."""
    rnn = nn.RNN(2, 16, nonlinearity="relu", bidirectional=bidirectional, dtype=torch.float64)
    rest = torch.full((16,), 10.0, dtype=torch.float64)
    with torch.no_grad():
        for suffix in ["l0", "l0_reverse"][: 1 + bidirectional]:
            weight = getattr(rnn, f"weight_hh_{suffix}")
            nn.init.orthogonal_(weight).mul_(a)
            # h = 10 everywhere is a fixed point; the inputs move it by far less than 10.
            getattr(rnn, f"bias_ih_{suffix}").copy_(rest - weight @ rest)
            getattr(rnn, f"bias_hh_{suffix}").zero_()
            getattr(rnn, f"weight_ih_{suffix}").mul_(1e-4)
    return rnn, rest.expand(1 + bidirectional, 3, 16)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("everywhere", [False, True], ids=["last step", "every step"])
@pytest.mark.parametrize("a", [0.5, 0.8, 1.0, 1.2])
def test_linear_rnn_scales_the_gradient_by_a_at_every_step(
    a: float, everywhere: bool, bidirectional: bool
) -> None:
    rnn, hx = linear_rnn(a, bidirectional=bidirectional)
    x = torch.randn(50, 3, 2, dtype=torch.float64)
    output, h_n = rnn(x, hx)
    assert output.min() > 0
    grads = (
        {"grad_output": torch.randn_like(output)}
        if everywhere
        else {"grad_hn": torch.randn_like(h_n)}
    )
    ours = recurrent_adjoint(rnn, x, hx, **grads, output=output)
    torch.testing.assert_close(ours.gain, torch.full_like(ours.gain, a), rtol=1e-10, atol=0)
    for k in range(1 + bidirectional):
        reading = TimeReading("rnn", f"l{k}", "exact", decay_rate=decay_rate(ours, k))
        assert reading.decay_rate == pytest.approx(math.log(a), abs=1e-10)
        if a != 1.0:
            assert reading.horizon == pytest.approx(math.log(1e3) / abs(math.log(a)))
            assert reading.half_life == pytest.approx(math.log(2) / abs(math.log(a)))
        assert ours.causes[k]["activation_slope"].item() == 1.0
        assert ours.causes[k]["spectral_radius"].item() == pytest.approx(a, rel=0.01)


def test_eight_tenths_over_fifty_steps() -> None:
    """0.8^50, the textbook's number, from the gradient itself."""
    rnn, hx = linear_rnn(0.8, bidirectional=False)
    x = torch.randn(51, 3, 2, dtype=torch.float64)
    grad = torch.randn(1, 3, 16, dtype=torch.float64)
    hidden = recurrent_adjoint(rnn, x, hx, grad_hn=grad).hidden[0].norm(dim=-1)
    torch.testing.assert_close(hidden[0] / hidden[-1], torch.full((3,), 0.8**50).double())


@pytest.mark.parametrize("gate", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gates_that_see_nothing_scale_the_gradient_by_themselves(kind: str, gate: float) -> None:
    """Without recurrent weights the forget (update) gate is all that the gradient goes through."""
    cls, index, name = {
        "lstm": (nn.LSTM, 1, "forget_gate"),
        "gru": (nn.GRU, 1, "update_gate"),
    }[kind]
    rnn = cls(3, 4, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.zero_()
        rnn.weight_ih_l0.chunk(4 if kind == "lstm" else 3)[index].zero_()
        rnn.bias_hh_l0.zero_()
        rnn.bias_ih_l0[4 * index : 4 * (index + 1)] = math.log(gate / (1 - gate))
    x = torch.randn(20, 2, 3, dtype=torch.float64)
    end = torch.randn(1, 2, 4, dtype=torch.float64)
    grads = {"grad_cn": end} if kind == "lstm" else {"grad_hn": end}
    ours = recurrent_adjoint(rnn, x, **grads)
    torch.testing.assert_close(ours.gain, torch.full_like(ours.gain, gate))
    assert ours.causes[0][name].item() == pytest.approx(gate)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("input_size", [4, 10])
def test_default_lstm_forgets_at_the_known_rate(input_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    rnn = nn.LSTM(input_size, 110)
    x, grad = torch.randn(120, 8, input_size), torch.zeros(120, 8, 110)
    grad[-1] = torch.randn(8, 110)
    assert -0.48 < decay_rate(recurrent_adjoint(rnn, x, grad_output=grad)) < -0.44


def test_forget_bias_of_five_remembers() -> None:
    rnn = nn.LSTM(8, 110)
    with torch.no_grad():
        rnn.bias_ih_l0[110:220] = 5.0
        rnn.bias_hh_l0[110:220] = 0.0
    x, grad = torch.randn(120, 8, 8), torch.zeros(120, 8, 110)
    grad[-1] = torch.randn(8, 110)
    assert abs(decay_rate(recurrent_adjoint(rnn, x, grad_output=grad))) < 0.05


class CharacterModel(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 16)
        self.rnn = nn.LSTM(16, 48)
        self.head = nn.Linear(48, characters)

    def loss(self, tokens_TB: Tensor, kept: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy at the kept timesteps, with the input and output of the LSTM."""
        x = self.embedding(tokens_TB[:-1])
        output = self.rnn(x)[0]
        logits = self.head(output[kept])
        return (
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens_TB[1:][kept].flatten()),
            x,
            output,
        )

    def adjoint(self, tokens_TB: Tensor, kept: slice, entering: slice) -> RecurrentAdjoint:
        """What the loss of the kept timesteps sends back in time from the entering ones."""
        loss, x, output = self.loss(tokens_TB, kept)
        (grad,) = torch.autograd.grad(loss, output)
        entered = torch.zeros_like(grad)
        entered[entering] = grad[entering]
        return recurrent_adjoint(self.rnn, x, grad_output=entered, output=output)


def slope_on_lag(norms_T: Tensor) -> float:
    lag = torch.arange(len(norms_T)).flip(0).float()
    lag -= lag.mean()
    return (lag @ norms_T.log() / lag.square().sum()).item()


@pytest.mark.parametrize("trained", [False, True])
def test_loss_at_every_step_hides_what_vanishes(trained: bool) -> None:
    """A language model on source code, whose loss enters at each character."""
    source = inspect.getsource(argparse)
    characters = sorted(set(source))
    text = torch.tensor([characters.index(character) for character in source])
    windows = text[: len(text) // 65 * 65].view(-1, 65).T
    model = CharacterModel(len(characters))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model.loss(windows[:, :16], slice(None))[0].item()
    for _ in range(100 * trained):
        some = torch.randint(windows.shape[1], (16,))
        loss = model.loss(windows[:, some], slice(None))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not trained or model.loss(windows[:, :16], slice(None))[0] < 0.7 * first

    tokens, everywhere, end = windows[:, 16:48], slice(None), slice(-1, None)
    last_step = model.adjoint(tokens, end, end)
    every_step = model.adjoint(tokens, everywhere, everywhere)
    # Each timestep sends its own signal on top of what comes from later ones, so the norm of
    # the sum is about the same everywhere ...
    rate = decay_rate(last_step)
    assert rate < -0.15
    assert abs(slope_on_lag(every_step.hidden[0].square().sum((1, 2)).sqrt())) < 0.02
    # ... and its gain is that of a mixture that is ever new, of which much is lost in one step.
    assert decay_rate(every_step) < 1.5 * rate
    # Only what has entered at one timestep shows how far it gets, whatever else the loss sends.
    assert decay_rate(model.adjoint(tokens, everywhere, end)) == pytest.approx(rate, rel=1e-3)
    norm_T = torch.linalg.vector_norm(every_step.followed[0], dim=-1)
    gain_S = norm_T[:-1] / norm_T[1:]
    assert gain_S.log().mean().item() == pytest.approx(rate, rel=1e-3)
