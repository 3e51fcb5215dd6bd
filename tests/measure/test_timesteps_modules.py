"""Which modules a probe watches, how it is told, and modules without a recurrence."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.measure.timesteps import TimestepProbe

T, B, I, H = 6, 4, 8, 8  # noqa: E741 - input


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(I, H)
        self.encoder = nn.ModuleDict({"rnn": nn.GRU(H, H), "cell": nn.LSTMCell(H, H)})
        layer = nn.TransformerEncoderLayer(H, 2, 16, dropout=0.0)
        self.attention = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.conv = nn.Conv1d(H, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.encoder["rnn"](self.embed(x))
        state = None
        for x_t in hidden:
            state = self.encoder["cell"](x_t, state)
        seen = self.attention(hidden) + state[0]
        return self.conv(seen.permute(1, 2, 0))


def test_auto_finds_recurrent_modules_and_the_outermost_attention() -> None:
    with TimestepProbe(Model()) as probe:
        assert probe.names == ("encoder.rnn", "encoder.cell", "attention")
        assert probe.unwatched == {}


def test_lone_attention() -> None:
    model = nn.ModuleDict(
        {"layer": nn.TransformerEncoderLayer(8, 2), "heads": nn.MultiheadAttention(8, 2)}
    )
    with TimestepProbe(model) as probe:
        assert probe.names == ("layer", "heads")
    assert TimestepProbe(nn.Linear(2, 2)).names == ()


def test_the_model_itself_goes_by_its_type() -> None:
    with TimestepProbe(nn.LSTM(I, H)) as probe:
        assert probe.names == ("LSTM",)


@pytest.mark.parametrize("exact", [False, True])
def test_a_subclass_is_of_its_parents_kind(exact: bool) -> None:
    class Mine(nn.LSTM):
        pass

    class OutputOnly(nn.GRU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    for rnn, kind in [(Mine(I, H), "lstm"), (OutputOnly(I, H), "gru")]:
        with TimestepProbe(rnn) as probe:
            probe.exact = exact
            output = rnn(torch.randn(T, B, I))
            (output[0] if isinstance(output, tuple) else output).sum().backward()
            (reading,) = probe.measure()
        assert (reading.module, reading.kind) == (kind.upper(), kind)
        if exact:
            assert ("its forward is not torch's own" in reading.note) == (kind == "gru")


def test_names_and_patterns() -> None:
    model = Model()
    for modules, names in [
        (["encoder.rnn"], ("encoder.rnn",)),
        (["*.cell", "encoder.*"], ("encoder.cell", "encoder.rnn")),
        (["attention.layers.0"], ("attention.layers.0",)),
        ({"conv": -1, "encoder.rnn": 0}, ("conv", "encoder.rnn")),
        ({"attention.layers.?": 0}, ("attention.layers.0", "attention.layers.1")),
        ([], ()),
    ]:
        with TimestepProbe(model, modules) as probe:
            assert probe.names == names


def test_a_name_that_matches_nothing_gets_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"'encoder\.rn', which matches none") as error:
        TimestepProbe(Model(), ["encoder.rn"])
    assert "nearest: 'encoder.rnn', 'encoder'" in str(error.value)
    assert str(error.value).count("', '") == 2
    with pytest.raises(ValueError, match="matches none"):
        TimestepProbe(Model(), {"missing.*": 1})


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        (["conv"], ValueError, r"time axis of 'conv' \(Conv1d\), which is not known"),
        ({"conv": True}, TypeError, "time axis of 'conv' in modules must be an integer"),
        ({"conv": 1.0}, TypeError, "time axis of 'conv' in modules must be an integer"),
        ({"encoder.rnn": 1}, ValueError, "must be 0, as its batch_first is False, got 1"),
        ({"encoder.cell": 0}, ValueError, "each of its calls is one timestep"),
        ("all", ValueError, "modules must be 'auto'"),
        (7, TypeError, "modules must be 'auto'"),
        ([7], TypeError, "a name in modules must be a string"),
    ],
)
def test_bad_arguments(modules: Any, error: type[Exception], message: str) -> None:
    model = Model()
    with pytest.raises(error, match=message):
        TimestepProbe(model, modules)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError, match="model must be"):
        TimestepProbe("model")


def test_only_modules_that_train() -> None:
    model = Model()
    model.encoder["rnn"].requires_grad_(requires_grad=False)
    with TimestepProbe(model) as probe:
        assert probe.names == ("encoder.cell", "attention")
    with TimestepProbe(model, parameters=list(model.encoder.parameters())) as probe:
        assert probe.names == ("encoder.rnn", "encoder.cell")
    with TimestepProbe(model, parameters=[]) as probe:
        assert probe.names == ()


def test_a_shared_module_is_watched_once() -> None:
    rnn = nn.LSTM(I, I)
    model = nn.ModuleDict({"first": rnn, "second": rnn})
    with TimestepProbe(model) as probe:
        assert probe.names == ("first",)
        second = model["second"](model["first"](torch.randn(T, B, I))[0])[0]
        second.pow(2).sum().backward()
        (reading,) = probe.measure()
        assert reading.sequences == 2 * B
    with TimestepProbe(model, ["second"]) as probe:
        assert probe.names == ("second",)
    assert not rnn._forward_hooks


def test_gradient_of_an_output() -> None:
    model = Model()
    x = torch.randn(T, B, I)
    twin = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda grad: seen.__setitem__(name, grad.double()))

        return hook

    twin.attention.register_forward_hook(keep("attention"))
    twin.conv.register_forward_hook(keep("conv"))
    twin(x).pow(2).mul(torch.arange(T)).sum().backward()
    with TimestepProbe(model, {"attention": 0, "conv": 2}) as probe:
        model(x).pow(2).mul(torch.arange(T)).sum().backward()
        attention, conv = probe.measure()
    squares = seen["attention"].square().sum(-1).mean(1).sqrt()
    assert attention.profile == pytest.approx(squares.tolist(), rel=1e-4)
    squares = seen["conv"].square().sum(1)
    alive = torch.arange(T).ge(0).sum()
    assert conv.profile == pytest.approx(squares.mean(0).sqrt().tolist(), rel=1e-4)
    assert conv.recency == pytest.approx((squares[:, -1].sum() / squares.sum()).item(), rel=1e-4)
    for reading in (attention, conv):
        assert reading.source == "output"
        assert (reading.timesteps, reading.sequences) == (alive, B)
        assert math.isnan(reading.decay_rate)
        assert reading.note.startswith("no recurrence")


@pytest.mark.parametrize("batch_first", [False, True])
def test_time_axis_of_attention(batch_first: bool) -> None:
    heads = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    x = torch.randn((B, T, 8) if batch_first else (T, B, 8))
    for model, call in [(heads, (x, x, x)), (layer, (x,)), (encoder, (x,))]:
        with TimestepProbe(model) as probe:
            output = model(*call)
            (output[0] if isinstance(output, tuple) else output).pow(2).sum().backward()
            (reading,) = probe.measure()
            assert (reading.timesteps, reading.sequences) == (T, B)
    unbatched = torch.randn(T, 8)
    with TimestepProbe(encoder) as probe:
        encoder(unbatched).pow(2).sum().backward()
        (reading,) = probe.measure()
    assert (reading.timesteps, reading.sequences) == (T, 1)


def test_a_time_axis_that_does_not_exist() -> None:
    model = Model()
    with TimestepProbe(model, {"conv": 3, "embed": 0}) as probe:
        model(torch.randn(T, B, I)).sum().backward()
        assert [reading.module for reading in probe.measure()] == ["embed"]
        assert probe.unwatched == {
            "conv": "the output of 'conv' has 3 dimensions, and so no time axis 3"
        }


def test_a_mapping_or_several_outputs() -> None:
    class Several(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"length": 3, "hidden": super().forward(x)}

    model = nn.Sequential(Several(I, H))
    with TimestepProbe(model, {"0": 1}) as probe:
        model(torch.randn(B, T, I))["hidden"].sum().backward()
        (reading,) = probe.measure()
    assert (reading.timesteps, reading.sequences) == (T, B)


def test_a_module_that_is_not_called_is_named() -> None:
    model = Model()
    with TimestepProbe(model, ["encoder.rnn", "attention"]) as probe:
        assert probe.unwatched == {}
        with torch.no_grad():
            model(torch.randn(T, B, I))
        model.encoder["rnn"](torch.randn(T, B, H))[0].sum().backward()
        probe.measure()
        assert list(probe.unwatched) == ["attention"]
        assert "was not seen in training so far" in probe.unwatched["attention"]
        model(torch.randn(T, B, I)).sum().backward()
        assert probe.unwatched == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_named() -> None:
    model = nn.ModuleDict({"rnn": torch.jit.script(nn.LSTM(I, H)), "other": nn.GRU(I, H)})
    with TimestepProbe(model) as probe:
        assert probe.names == ("other",)
        assert list(probe.unwatched) == ["rnn"]
        assert "TorchScript" in probe.unwatched["rnn"]


def test_evaluation_of_a_lone_encoder_layer_keeps_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(B, T, 8)

    def operations() -> set[str]:
        with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
            layer(x)
        return {event.key for event in profile.key_averages()}

    layer.eval()
    assert "aten::_transformer_encoder_layer_fwd" in operations()
    with TimestepProbe(layer) as probe:
        for _ in range(2):
            layer.eval()
            assert "aten::_transformer_encoder_layer_fwd" in operations()
            layer.train()
            probe.measure()
            layer(x).pow(2).sum().backward()
            assert len(probe.measure()) == 1
        layer.eval()
        operations()
    probe.measure()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
