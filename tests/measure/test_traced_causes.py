"""What a module is and what its decay follows from, where it notes its states while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.nn import (
    GRU,
    LSTM,
    RNN,
    BatchNormLSTM,
    DilatedRNN,
    LayerNormGRU,
    LayerNormLSTM,
    SkipGRU,
    SkipLSTM,
    TemporalSkipRNN,
)
from lightning_gradguard.readings import TimeReading
from tests.nn.twins import TwinGRU, TwinLSTM

F64 = torch.float64
IN, H, T = 3, 6, 12

LSTMS: dict[str, Callable[..., nn.Module]] = {
    "residual": lambda **k: LSTM(IN, H, 2, residual=True, **k),
    "layer norm": lambda **k: LayerNormLSTM(IN, H, 2, **k),
    "batch norm": lambda **k: BatchNormLSTM(IN, H, 2, max_length=T, **k),
    "skip": lambda **k: SkipLSTM(IN, H, 2, share_gate=False, **k),
    "temporal skip": lambda **k: TemporalSkipRNN(IN, H, 2, skip=3, cell="lstm", **k),
}
GRUS: dict[str, Callable[..., nn.Module]] = {
    "residual": lambda **k: GRU(IN, H, 2, residual=True, **k),
    "layer norm": lambda **k: LayerNormGRU(IN, H, 2, **k),
    "skip": lambda **k: SkipGRU(IN, H, 2, share_gate=False, **k),
    "temporal skip": lambda **k: TemporalSkipRNN(IN, H, 2, skip=3, cell="gru", **k),
}
ELMANS: dict[str, dict[str, Any]] = {
    "tanh": {"residual": True},
    "relu": {"residual": True},
    "leaky_relu": {"negative_slope": 0.2},
    "prelu": {},
}


class Seen(TorchFunctionMode):
    """Keeps the results of one function of torch."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.results = function, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.function:
            self.results.append(result.detach())
        return result


def read(module: nn.Module, sequence: Any) -> list[TimeReading]:
    with TimestepProbe(module) as probe:
        output = module(sequence)[0]
        (output if isinstance(output, Tensor) else output.data).square().sum().backward()
        return probe.measure()


def noisy(module: nn.Module) -> nn.Module:
    """Gates far from one half, and from each other; where steps can be skipped, none is."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
            if name.startswith("bias_update"):
                parameter.fill_(9.0)
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LSTMS)
def test_the_forget_gate_is_the_one_that_the_module_computes(name: str, bias: bool) -> None:
    module = noisy(LSTMS[name](bias=bias, dtype=F64))
    with Seen(torch.sigmoid) as seen:
        readings = read(module, torch.randn(T, 4, IN, dtype=F64))
    gates = [gate for gate in seen.results if gate.shape == (4, H)]
    # The order in which the equations take their sigmoids: f, i, o, or i, f, o under a norm.
    place = 1 if "norm" in name else 0
    for layer, reading in enumerate(readings):
        own = gates[3 * T * layer : 3 * T * (layer + 1)]
        forget = torch.stack(own[place::3])[1:]  # c is zero before the first timestep
        assert (reading.kind, reading.source) == ("lstm", "exact")
        assert reading.causes == pytest.approx({"forget_gate": forget.mean().item()}, rel=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GRUS)
def test_the_update_gate_is_the_one_that_the_module_computes(name: str, bias: bool) -> None:
    module = noisy(GRUS[name](bias=bias, dtype=F64))
    with Seen(torch.sigmoid) as seen:
        readings = read(module, torch.randn(T, 4, IN, dtype=F64))
    if name == "layer norm":
        updates = [gates[:, H:] for gates in seen.results]
    else:
        updates = [gate for gate in seen.results if gate.shape == (4, H)][1::2]
    for layer, reading in enumerate(readings):
        own = torch.stack(updates[T * layer : T * (layer + 1)])
        assert (reading.kind, reading.source) == ("gru", "exact")
        assert reading.causes == pytest.approx({"update_gate": own.mean().item()}, rel=1e-6)


@pytest.mark.parametrize("name", ELMANS)
def test_slope_and_radius_are_those_of_the_module(name: str) -> None:
    both, first = (
        RNN(IN, H, layers, nonlinearity=name, dtype=F64, **ELMANS[name]) for layers in (2, 1)
    )
    noisy(both)
    state = both.state_dict()
    if name == "prelu":  # below zero it would turn the sign of h around
        state["slope_l0"].fill_(0.3)
    first.load_state_dict({key: state[key] for key in first.state_dict()})
    x = torch.randn(T, 4, IN, dtype=F64)
    readings = read(both, x)
    assert [reading.kind for reading in readings] == [name, name]
    h = first(x)[0].detach()
    below = state.get("slope_l0", {"leaky_relu": 0.2}.get(name, 0.0))
    slopes = 1.0 - h.square() if name == "tanh" else torch.where(h > 0, 1.0, below)
    radius = torch.linalg.eigvals(state["weight_hh_l0"]).abs().max().item()
    causes = readings[0].causes
    assert causes["activation_slope"] == pytest.approx(slopes.mean().item(), rel=1e-6)
    assert causes["spectral_radius"] == pytest.approx(radius, rel=0.02)


def test_one_matrix_of_two_has_no_radius_that_says_anything() -> None:
    module = TemporalSkipRNN(IN, H, skip=3, dtype=F64)
    x = torch.randn(T, 4, IN, dtype=F64)
    h = module(x)[0].detach()
    (reading,) = read(module, x)
    assert reading.kind == "tanh"
    slope = (1.0 - h.square()).mean().item()
    assert reading.causes == pytest.approx({"activation_slope": slope}, rel=1e-6)


@pytest.mark.parametrize("make", [SkipLSTM, SkipGRU])
def test_what_is_copied_is_kept_whole(make: type[SkipLSTM | SkipGRU]) -> None:
    module, x = make(IN, H, update_bias=-1.0), torch.randn(40, 4, IN)
    _, _, used = module(x, return_gates=True)
    (reading,) = read(module, x)
    updates = used[1:].mean().item()
    assert updates < 0.7
    (kept,) = reading.causes.values()
    # Where it updates, a gate with a bias of 1 keeps about 0.73.
    assert kept == pytest.approx(1.0 - updates * (1.0 - 0.73), abs=0.05)


@pytest.mark.parametrize("name", ["forget_gate", "update_gate"])
def test_units_in_zoneout_are_kept_whole(name: str) -> None:
    make: Any = LayerNormLSTM if name == "forget_gate" else LayerNormGRU
    plain, zoned = make(IN, H, dtype=F64), make(IN, H, zoneout=0.5, dtype=F64)
    zoned.load_state_dict(plain.state_dict())
    x = torch.randn(60, 16, IN, dtype=F64)
    causes = [read(module, x)[0].causes[name] for module in (plain, zoned)]
    assert causes[1] == pytest.approx(0.5 + 0.5 * causes[0], abs=0.02)


@pytest.mark.parametrize("name", ["layer norm", "residual", "temporal skip"])
@pytest.mark.parametrize("makers", [LSTMS, GRUS], ids=["lstm", "gru"])
def test_packed_and_reversed_sequences_count_as_they_are(
    name: str, makers: dict[str, Callable[..., nn.Module]]
) -> None:
    module = noisy(makers[name](bidirectional=True, dtype=F64))
    x = torch.randn(T, 4, IN, dtype=F64)
    whole, packed = read(module, x), read(module, pack_padded_sequence(x, [T] * 4))
    assert [r.part for r in whole] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    for one, other in zip(whole, packed, strict=True):
        assert one.causes
        assert other.causes == pytest.approx(one.causes, rel=1e-6)
    (start, *_) = read(module, pack_padded_sequence(x[:, :1], [T]))
    lengths = pack_padded_sequence(x[:, [0, 0]], [T, 2])
    (mixed, *_) = read(module, lengths)
    assert mixed.causes != start.causes


def test_causes_that_are_not_known_are_left_out() -> None:
    x = torch.randn(T, 4, IN)
    unknown: list[tuple[nn.Module, str]] = [
        (TwinLSTM(IN, H), "lstm"),  # the equations are the user's
        (TwinGRU(IN, H), "gru"),
        (SkipGRU(IN, H, 2), "gru"),  # layers share a gate
    ]
    parametrized = weight_norm(LayerNormGRU(IN, H), "weight_hh_l0")
    for module, kind in [*unknown, (parametrized, "other")]:
        (reading,) = read(module, x)
        assert (reading.kind, reading.source, reading.causes) == (kind, "exact", {})
    (both,) = read(SkipLSTM(IN, H, 2), x)
    assert set(both.causes) == {"forget_gate"}


def test_under_autocast_and_in_half_precision_they_are_nearly_the_same() -> None:
    for module in (LayerNormGRU(IN, H), LayerNormLSTM(IN, H), RNN(IN, H, 2, residual=True)):
        x = torch.randn(T, 4, IN)
        exact = read(module, x)[0].causes
        with torch.autocast("cpu", torch.bfloat16):
            half = read(module, x)[0].causes
        assert half == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("length", [5, 8, 15])
def test_a_layer_whose_steps_are_too_long_for_the_sequence_says_so(length: int) -> None:
    readings = read(DilatedRNN(IN, H, 2, cell="gru", dilations=(1, 8)), torch.randn(length, 4, IN))
    assert [reading.note for reading in readings] == [
        "",
        "its sequences are shorter than two of its steps of 8 timesteps, too few for a rate",
    ]
    assert [reading.kind for reading in readings] == ["gru", "gru"]
