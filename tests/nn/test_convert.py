"""From torch's recurrent modules to ours, with the same parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_gradguard.nn.convert import from_torch
from lightning_gradguard.nn.dilated import DilatedRNN
from lightning_gradguard.nn.normalized import LayerNormGRU, LayerNormLSTM
from lightning_gradguard.nn.rnn import GRU, LSTM, RNN
from lightning_gradguard.nn.skip import SkipGRU, SkipLSTM
from lightning_gradguard.nn.temporal_skip import TemporalSkipRNN

I, H = 3, 4  # noqa: E741 - input
SOURCES: dict[str, tuple[type[nn.RNNBase], type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, LSTM, {}),
    "projected": (nn.LSTM, LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, GRU, {}),
    "tanh": (nn.RNN, RNN, {}),
    "relu": (nn.RNN, RNN, {"nonlinearity": "relu"}),
}


def states_of(result: Any) -> list[Tensor]:
    output, states = result
    return [output, *(states if isinstance(states, tuple) else (states,))]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("more", [{}, {"bidirectional": True, "bias": False, "batch_first": True}])
def test_the_same_architecture_and_the_same_bits(name: str, more: dict[str, Any]) -> None:
    torchs, ours, own = SOURCES[name]
    rnn = torchs(I, H, num_layers=2, dropout=0.5, **own, **more)
    new = from_torch(rnn)
    assert type(new) is ours
    assert list(new.state_dict()) == list(rnn.state_dict())
    assert all(a is b for a, b in zip(new.parameters(), rnn.parameters(), strict=True))
    x, results = torch.randn(5, 2, I), []
    for module in (rnn, new):
        torch.manual_seed(1)
        results.append(states_of(module(x)))
    assert all(map(torch.equal, *results))

    back = from_torch(new, torchs)
    assert type(back) is torchs
    assert all(a is b for a, b in zip(back.parameters(), rnn.parameters(), strict=True))


def test_an_optimizer_made_before_goes_on() -> None:
    model = nn.ModuleDict({"rnn": nn.GRU(I, H, num_layers=2), "head": nn.Linear(H, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
    model.set_submodule("rnn", from_torch(model["rnn"]))
    x = torch.randn(5, 2, I)
    for step in range(3):
        for module, updates in ((model, optimizer), (twin, twin_optimizer)):
            updates.zero_grad()
            module["head"](module["rnn"](x)[0]).square().sum().backward()
            updates.step()
        assert all(map(torch.equal, model.parameters(), twin.parameters())), step


@pytest.mark.parametrize(
    ("rnn", "kind", "options"),
    [
        (nn.LSTM(I, H, 2, bidirectional=True), LayerNormLSTM, {}),
        (nn.GRU(I, H, 2, batch_first=True), LayerNormGRU, {}),
        (nn.LSTM(I, H, 2), SkipLSTM, {"update_bias": 2.0}),
        (nn.GRU(I, H, 2), SkipGRU, {}),
        (nn.GRU(I, H, 2, bias=False), GRU, {"dropout": 0.5, "residual": True}),
        (nn.RNN(I, H, 2), RNN, {"nonlinearity": "prelu", "residual": True}),
        (nn.RNN(I, H), TemporalSkipRNN, {"skip": 2}),
        (RNN(I, H, nonlinearity="leaky_relu", negative_slope=0.1), RNN, {"nonlinearity": "relu"}),
    ],
)
def test_another_class_with_the_same_gates(
    rnn: nn.RNNBase, kind: type[nn.Module], options: dict[str, Any]
) -> None:
    new = from_torch(rnn, kind, **options)
    assert type(new) is kind
    found = dict(new.named_parameters())
    assert all(found[name] is parameter for name, parameter in rnn.named_parameters())
    assert all(getattr(new, name) == value for name, value in options.items())
    assert new.batch_first == rnn.batch_first
    output = new(torch.randn(5, 2, I))[0]
    output.sum().backward()
    assert rnn.weight_hh_l0.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dilated_layers_take_the_weights_of_torchs(kind: type[nn.RNNBase]) -> None:
    rnn = kind(I, H, 2, bidirectional=True)
    cell = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn"}[kind]
    x = torch.randn(7, 2, I)
    undilated = from_torch(rnn, DilatedRNN, cell=cell, dilations=(1, 1))
    torch.testing.assert_close(undilated(x)[0], rnn(x)[0])
    assert {id(p) for p in undilated.parameters()} == {id(p) for p in rnn.parameters()}

    loaded = nn.Sequential(DilatedRNN(I, H, 2, bidirectional=True, cell=cell, dilations=(1, 1)))
    loaded.load_state_dict({f"0.{name}": value for name, value in rnn.state_dict().items()})
    torch.testing.assert_close(loaded(x)[0], rnn(x)[0])
    again = copy.deepcopy(loaded)
    again.load_state_dict(loaded.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.2\.weight_ih_l0"):
        undilated.load_state_dict(kind(I, H, 3, bidirectional=True).state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [LSTM, DilatedRNN])
def test_cuda_runs_shared_weights_without_compacting_them(kind: type[nn.Module]) -> None:
    rnn = nn.LSTM(I, H, 3, bidirectional=True).cuda()
    new = from_torch(rnn, kind, residual=True)
    new(torch.randn(6, 2, I, device="cuda"))  # a warning is an error


def test_what_ours_has_is_kept() -> None:
    rnn = RNN(I, H, 2, "leaky_relu", negative_slope=0.3, residual=True)
    new = from_torch(rnn)
    assert repr(new) == repr(rnn)
    x = torch.randn(5, 2, I)
    assert torch.equal(new(x)[0], rnn(x)[0])
    slopes = from_torch(RNN(I, H, nonlinearity="prelu"), residual=True)
    assert slopes.nonlinearity == "prelu"


def test_place_dtype_mode_and_freezing() -> None:
    rnn = nn.LSTM(I, H, dtype=torch.float64).eval()
    rnn.weight_ih_l0.requires_grad_(False)
    new = from_torch(rnn, SkipLSTM)
    assert not new.training
    assert not new.weight_ih_l0.requires_grad
    assert {parameter.dtype for parameter in new.parameters()} == {torch.float64}
    assert from_torch(nn.GRU(I, H, device="meta")).weight_ih_l0.is_meta


@pytest.mark.parametrize(
    ("rnn", "kind", "options", "error", "message"),
    [
        (nn.Linear(2, 2), None, {}, TypeError, "rnn must be an nn.LSTM, nn.GRU or nn.RNN"),
        (nn.LSTMCell(2, 2), None, {}, TypeError, "rnn must be an nn.LSTM, nn.GRU or nn.RNN"),
        (nn.LSTM(2, 2), "SkipLSTM", {}, TypeError, "kind must be a class of recurrent modules"),
        (nn.LSTM(2, 2), dict, {}, TypeError, "kind must be a class of recurrent modules"),
        (nn.LSTM(2, 2), nn.Linear, {}, TypeError, "kind must be a class of recurrent modules"),
        (
            nn.LSTM(2, 2),
            GRU,
            {},
            TypeError,
            "kind must have the gates of an LSTM, like rnn, got GRU",
        ),
        (nn.GRU(2, 2), SkipLSTM, {}, TypeError, "kind must have the gates of a GRU, like rnn, got"),
        (nn.RNN(2, 2), LSTM, {}, TypeError, "kind must have the gates of an Elman RNN, like rnn"),
        (nn.GRU(2, 2), DilatedRNN, {}, TypeError, "kind must have the gates of a GRU, like rnn"),
        (
            nn.LSTM(2, 3, proj_size=1),
            SkipLSTM,
            {},
            ValueError,
            "must not have proj_size=1 to become",
        ),
        (
            nn.RNN(2, 3, 1, "relu"),
            GRU,
            {},
            ValueError,
            "not have nonlinearity='relu' to become GRU",
        ),
        (LSTM(2, 3, 2, residual=True), nn.LSTM, {}, ValueError, "must not have residual=True"),
        (
            RNN(2, 3, nonlinearity="prelu"),
            RNN,
            {"nonlinearity": "relu"},
            ValueError,
            r"only parameters that RNN has too, got slope_l0 of shape \(1,\)",
        ),
        (nn.LSTM(2, 2), None, {"hidden": 3}, TypeError, "options must be arguments of LSTM"),
        (nn.LSTM(2, 2), None, {"num_layers": 2}, ValueError, "num_layers must be left out: it is"),
        (nn.LSTM(2, 2), None, {"proj_size": 1}, ValueError, "proj_size must be left out"),
        (nn.LSTM(2, 2), None, {"dtype": torch.float64}, ValueError, "dtype must be left out"),
        (
            nn.LSTM(2, 2),
            None,
            {"init": "orthogonal"},
            ValueError,
            "init must be left out: the weights are those of rnn, got 'orthogonal'",
        ),
        (nn.LSTM(2, 2), None, {"forget_bias": 1.0}, ValueError, "forget_bias must be left out"),
        (weight_norm(nn.GRU(2, 2), "weight_hh_l0"), None, {}, ValueError, "not be parametrized"),
    ],
)
def test_what_cannot_be_converted(
    rnn: Any, kind: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_torch(rnn, kind, **options)
