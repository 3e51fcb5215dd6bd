"""Copies of a watched model, and a default device other than the model's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.swa_utils import AveragedModel

from lightning_gradguard.measure.adjoint import recurrent_adjoint
from lightning_gradguard.measure.timesteps import TimestepProbe
from tests.measure.time_readings import B, H, I, T


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def make_model() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.ModuleList([nn.LSTM(I, H), nn.GRUCell(I, H), layer])


def test_a_copy_of_a_watched_model_has_no_hooks_of_the_probe() -> None:
    model = make_model()
    calls: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, *_: calls.append(module))
    with TimestepProbe(model) as probe:
        watched = hooks_of(model)
        copies = [copy.deepcopy(model), AveragedModel(model).module]
        together = copy.deepcopy({"one": model, "again": model})
        copies.append(together["one"])
        assert together["again"] is together["one"]
        assert hooks_of(model) == watched > 1
        model[0](torch.randn(T, B, I))[0].sum().backward()
        assert len(probe.measure()) == 1
    for twin in copies:
        assert hooks_of(twin) == 1  # the user's own
        calls.clear()
        twin[0](torch.randn(T, B, I))
        assert calls == [twin[0]]
    assert hooks_of(model) == 1


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(I, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0][-1]


def script(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer torch, of scripting at all
        return torch.jit.script(model)


def test_a_copy_of_a_watched_model_can_be_scripted() -> None:
    model, x = Last(), torch.randn(T, B, I)
    with TimestepProbe(model):
        scripted = script(copy.deepcopy(model))
    assert torch.equal(scripted(x), model(x))


def test_scripting_a_watched_model_says_what_to_do() -> None:
    model = Last()
    with TimestepProbe(model), pytest.raises(AttributeError, match=r"copy\.deepcopy"):
        script(model)
    assert script(model)(torch.randn(T, B, I)).shape == (B, H)


@pytest.fixture
def _meta_by_default() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("_meta_by_default")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_default_device_does_not_matter(*, packed: bool, exact: bool) -> None:
    rnn = nn.LSTM(I, H, device="cpu", bidirectional=True)
    with torch.device("cpu"):
        sizes = (T, 20, I)  # more sequences than are kept
        x = torch.randn(sizes)
        lengths = torch.arange(T, T - 20, -1).clamp(min=1)
        given = pack_padded_sequence(x, lengths) if packed else x
        states = (torch.zeros(2, 20, H), torch.zeros(2, 20, H))
    with TimestepProbe(rnn) as probe:
        probe.exact = exact
        output, _ = rnn(given, states)
        (output.data if packed else output).square().sum().backward()
        readings = probe.measure()
    assert [reading.source for reading in readings] == (["exact"] * 2 if exact else ["input"])
    assert all(reading.note == "" for reading in readings if exact)


@pytest.mark.usefixtures("_meta_by_default")
def test_the_default_device_does_not_matter_to_the_adjoint() -> None:
    rnn = nn.GRU(I, H, device="cpu", bidirectional=True)
    x = torch.randn(T, B, I, device="cpu")
    adjoint = recurrent_adjoint(rnn, x, grad_output=torch.ones(T, B, 2 * H, device="cpu"))
    assert adjoint.lengths.device.type == adjoint.hidden.device.type == "cpu"
