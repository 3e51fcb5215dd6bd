"""Models that are compiled: their graphs stay whole, and what cannot be watched is named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_gradguard.measure.timesteps import TimestepProbe

T, B, I, H = 6, 4, 8, 8  # noqa: E741 - input


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(I, H)
        self.rnn = nn.LSTM(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.embed(x))[0][-1].pow(2).sum()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(I, 2, 16, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cell = nn.GRUCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for x_t in self.encoder(x).unbind(0):
            state = self.cell(x_t, torch.zeros(B, H) if state is None else state)
        return state.pow(2).sum()


def compiled(model: nn.Module, way: str) -> nn.Module:
    if way == "function":
        return torch.compile(model, backend="aot_eager")
    model.compile(backend="aot_eager")
    return model


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(x).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("way", ["function", "method"])
@pytest.mark.parametrize("first", ["probe", "compile", "first call"])
def test_recurrent_modules_are_watched_in_compiled_models(way: str, first: str) -> None:
    model, x = Recurrent(), torch.randn(T, B, I)
    expected = gradients(copy.deepcopy(model), model, x)
    twin = copy.deepcopy(model)
    expected = gradients(twin, twin, x)
    probe = TimestepProbe(model) if first == "probe" else None
    run = compiled(model, way)
    if first == "first call":
        gradients(run, model, x)
    with probe or TimestepProbe(model) as probe:
        for _ in range(4):
            for ours, theirs in zip(gradients(run, model, x), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
            (reading,) = probe.measure()
            assert (reading.module, reading.source, reading.note) == ("rnn", "exact", "")
            assert reading.decay_rate < 0
            probe.exact = not probe.exact
            if not probe.exact:
                gradients(run, model, x)
                assert [reading.source for reading in probe.measure()] == ["input"]
                probe.exact = True
        assert probe.unwatched == {}
    assert counters["stats"]["unique_graphs"] <= 1
    assert not counters["recompiles"]


def test_a_compiled_submodule_goes_by_its_own_name() -> None:
    model = Recurrent()
    model.rnn = torch.compile(model.rnn, backend="aot_eager")
    with TimestepProbe(model) as probe:
        assert probe.names == ("rnn",)
        model(torch.randn(T, B, I)).backward()
        (reading,) = probe.measure()
        assert reading.note == ""
    wrapped = torch.compile(nn.LSTM(I, H), backend="aot_eager")
    with TimestepProbe(wrapped) as probe:
        assert len(probe.names) == 1
        wrapped(torch.randn(T, B, I))[0].sum().backward()
        assert len(probe.measure()) == 1


@pytest.mark.parametrize("way", ["function", "method"])
@pytest.mark.parametrize("first", ["probe", "first call"])
def test_compiled_attention_and_cells_are_named(way: str, first: str) -> None:
    model, x = Attention(), torch.randn(T, B, I)
    twin = copy.deepcopy(model)
    expected = gradients(twin, twin, x)
    probe = TimestepProbe(model) if first == "probe" else None
    run = compiled(model, way)
    if first == "first call":
        gradients(run, model, x)
    with probe or TimestepProbe(model) as probe:
        for exact in (True, False, True):
            probe.exact = exact
            for ours, theirs in zip(gradients(run, model, x), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
            assert probe.measure() == []
        assert list(probe.unwatched) == ["encoder", "cell"]
        assert all("torch.compile" in reason for reason in probe.unwatched.values())
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_one_graph_is_asked_for_and_stays_one() -> None:
    """``fullgraph=True`` raises at any break, and so would a hook that is kept from the graph."""
    model, x = Attention(), torch.randn(T, B, I)
    with TimestepProbe(model):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).backward()
    with torch._dynamo.config.patch(allow_rnn=True):
        recurrent = Recurrent()
        with TimestepProbe(recurrent) as probe:
            torch.compile(recurrent, backend="aot_eager", fullgraph=True)(x).backward()
            assert probe.measure() == []
            assert list(probe.unwatched) == ["rnn"]
