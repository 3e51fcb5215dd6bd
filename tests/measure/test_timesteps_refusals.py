"""Fused modules that cannot be measured exactly: they work as ever, and it is said why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lightning_gradguard
from lightning_gradguard.measure import _recurrent_readings
from lightning_gradguard.measure.timesteps import TimestepProbe
from lightning_gradguard.readings import TimeReading
from tests.measure.time_readings import B, H, I, T

# The checkout around it may have any name, that of the project as well.
PACKAGE = Path(lightning_gradguard.__file__).parent


def measured(rnn: nn.Module, *arguments: Any) -> TimeReading:
    with TimestepProbe(rnn) as probe:
        rnn(*arguments)[0].square().sum().backward()
        (reading,) = probe.measure()
    return reading


def test_a_pair_of_states_may_be_a_list() -> None:
    rnn, x = nn.LSTM(I, H), torch.randn(T, B, I)
    states = torch.randn(2, 1, B, H)
    ours, expected = measured(rnn, x, list(states)), measured(rnn, x, tuple(states))
    assert (ours.source, ours.note) == ("exact", "")
    assert ours.decay_rate == expected.decay_rate
    assert ours.profile == expected.profile


class Marked(Tensor):
    """A tensor of another type."""


def test_states_of_an_unknown_kind_are_not_captured() -> None:
    rnn, x = nn.LSTM(I, H), torch.randn(T, B, I)
    states = torch.randn(2, 1, B, H)
    reading = measured(rnn, x, (states[0], states[1].as_subclass(Marked)))
    assert reading.source == "input"
    assert "the state that it was given is of an unknown kind" in reading.note
    assert all(value > 0 for value in reading.profile)  # the rest is known all the same
    with TimestepProbe(rnn):  # torch's own words on what it does not take
        for bad in ([torch.zeros(1, B, H)], torch.zeros(1, B, H), 3):
            with pytest.raises((RuntimeError, TypeError, IndexError)) as caught:
                rnn(x, bad)
            assert PACKAGE not in Path(caught.traceback[-1].path).parents


class Padded(nn.LSTM):
    def forward(self, x: Tensor, lengths: Any) -> Any:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, states = super().forward(packed)
        return pad_packed_sequence(output)[0], states


@pytest.mark.parametrize("lengths", [[T, 3, 5, 2], torch.tensor([T, 3, 5, 2])])
def test_a_forward_of_its_own_is_not_repeated(lengths: Any) -> None:
    reading = measured(Padded(I, H), torch.randn(T, B, I), lengths)
    assert reading.source == "input"
    assert reading.note == "not measured exactly: its forward is not torch's own"
    assert (reading.timesteps, reading.sequences) == (T, B)
    assert all(value > 0 for value in reading.profile)


def test_a_patched_forward_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = nn.GRU(I, H)
    inner = rnn.forward
    monkeypatch.setattr(rnn, "forward", lambda x, hx=None: inner(2 * x, hx))
    assert "its forward is not torch's own" in measured(rnn, torch.randn(T, B, I)).note


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_what_the_adjoint_refuses_is_not_measured_exactly(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error("not this one")

    monkeypatch.setattr(_recurrent_readings, "recurrent_adjoint", refuse)
    reading = measured(nn.GRU(I, H), torch.randn(T, B, I))
    assert (reading.source, reading.note) == ("input", "not measured exactly: not this one")


def test_watching_a_parametrized_module_does_not_run_its_parametrization() -> None:
    kept = []
    for watched in (False, True):
        torch.manual_seed(0)
        rnn = parametrizations.spectral_norm(nn.LSTM(I, H), "weight_hh_l0")
        x = torch.randn(T, B, I)
        if watched:
            reading = measured(rnn, x)
            assert reading.source == "input"
            assert "its weights are parametrized" in reading.note
        else:
            rnn(x)[0].square().sum().backward()
        kept.append(rnn.state_dict())
    assert all(torch.equal(kept[0][name], value) for name, value in kept[1].items())


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (1, "it was called with sequences of one timestep"),
        (4, "it was called one timestep at a time; the way from call to call is not measured"),
    ],
)
def test_single_timesteps_are_told_apart_from_a_loop_of_them(calls: int, words: str) -> None:
    rnn, state = nn.GRU(I, H), None
    with TimestepProbe(rnn) as probe:
        for x in torch.randn(calls, 1, B, I):
            output, state = rnn(x, state)
        output.square().sum().backward()
        (reading,) = probe.measure()
        assert reading.note.startswith(words)
        assert probe.measure() == []


@pytest.mark.parametrize("size", [(2, 0), (0, 2)])
def test_nothing_is_said_of_an_empty_batch(size: tuple[int, int]) -> None:
    rnn = nn.LSTM(8, H, batch_first=True)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(*size, 8)
    with TimestepProbe(nn.ModuleList([rnn, layer])) as probe:
        layer(x).sum().backward()
        if size[1]:  # torch refuses sequences without a timestep
            rnn(x)[0].sum().backward()
        assert probe.measure() == []
