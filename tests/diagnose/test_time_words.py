"""The words of findings about time, and whether their remedies do what they say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gradguard import nn as ours
from lightning_gradguard.diagnose import Finding, Pathology, Remedy, Severity
from lightning_gradguard.diagnose.remedies import remedies_for
from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.nn._gates import recurrent_layers
from lightning_gradguard.readings import ModelFacts
from tests.diagnose.time_runs import (
    CAUSES,
    diagnose,
    run,
    solved,
    steady,
    stuck,
)

PLACES = [
    ("rnn", "l0"),
    ("encoder.rnn", "l1_reverse"),
    ("layers.0", "l0"),
    ("blocks.2.rnn", ""),
    ("", "l0"),
]


def found(cell: str, module: str, part: str) -> list[Finding]:
    findings = []
    for rate in (-0.44, 0.12):
        for loss in (stuck(), solved):
            findings += diagnose(run(steady(rate), loss, 300, kind=cell, module=module, part=part))
    return findings


@pytest.mark.parametrize("cell", CAUSES)
@pytest.mark.parametrize(("module", "part"), PLACES)
def test_messages_read_well(cell: str, module: str, part: str) -> None:
    findings = found(cell, module, part)
    assert {(f.pathology, f.severity) for f in findings} == {
        (p, s)
        for p in (Pathology.EXPLODING, Pathology.VANISHING_IN_TIME)
        for s in (Severity.INFO, Severity.WARNING)
    }
    for finding in findings:
        message = finding.message
        assert re.fullmatch(r"The gradient .+\.", message), message
        assert not re.search(r"[.!?]\s", message), f"more than one sentence: {message}"
        assert re.search(r"every \d", message), message
        assert "120 steps" in message
        assert message.isascii()
        assert len(message) < 300, message
        assert "  " not in message
        assert (f"`{module}`" if module else "the model") in message
        assert ("layer" in message) == bool(part)
        assert ("reverse" in message) == part.endswith("reverse")
        assert finding.where == (module or "model")
        for name, value in CAUSES[cell].items():
            assert f"{name.replace('_', ' ')} of {value:.2f}" in message
            assert finding.evidence[name] == value


def test_the_message_names_place_reach_cause_and_loss() -> None:
    (finding,) = diagnose(run(steady(-0.44), stuck()))
    assert finding.message == (
        "The gradient vanishes through time in `rnn` (layer 0): it halves every 1.6 steps and "
        "reaches 16 of 120 steps, as follows from a mean forget gate of 0.52, while the loss is no "
        "better than early in training."
    )
    assert finding.evidence == pytest.approx(
        {
            "decay_rate": -0.44,
            "decay_error": 0.01,
            "half_life": math.log(2.0) / 0.44,
            "horizon": math.log(1e3) / 0.44,
            "timesteps": 120.0,
            "recency": 0.99,
            "readings": 3.0,
            "forget_gate": 0.52,
            "loss": 2.3,
            "early_loss": 2.3,
        },
        abs=0.02,
    )


def test_extreme_rates_read_well_too() -> None:
    words = []
    for rate in (-math.log(2.0), -9.0, 5.0):
        words += [f.message for f in diagnose(run(steady(rate), lambda _: None))]
    assert "halves every step and" in words[0]
    assert "reaches less than 1 of 120 steps" in words[1]
    assert "grows by 261 orders of magnitude over 120 steps" in words[2]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(3, 8, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 8, num_layers=2, bidirectional=True),
    "tanh": lambda: nn.RNN(3, 8, num_layers=2, bidirectional=True),
    "relu": lambda: nn.RNN(3, 8, num_layers=2, bidirectional=True, nonlinearity="relu"),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTMCell(3, 8),
    "gru": lambda: nn.GRUCell(3, 8),
    "tanh": lambda: nn.RNNCell(3, 8),
    "relu": lambda: nn.RNNCell(3, 8, nonlinearity="relu"),
}


def inside(path: str, module: nn.Module) -> nn.Module:
    """A model that has `module` at `path`."""
    for name in reversed(path.split(".") if path else []):
        parent = nn.Module()
        parent.add_module(name, module)
        module = parent
    return module


# Kind and part of a reading, and a module of this package that has such readings.
OWN: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "residual lstm": ("lstm", "l1", lambda: ours.LSTM(3, 8, 2, residual=True)),
    "layer norm lstm": ("lstm", "l1", lambda: ours.LayerNormLSTM(3, 8, 2, batch_first=True)),
    "batch norm lstm": ("lstm", "l0", lambda: ours.BatchNormLSTM(3, 8, max_length=120)),
    "skip lstm": ("lstm", "", lambda: ours.SkipLSTM(3, 8, 2)),
    "temporal skip lstm": ("lstm", "l0", lambda: ours.TemporalSkipRNN(3, 8, skip=4, cell="lstm")),
    "layer norm gru": ("gru", "l0_reverse", lambda: ours.LayerNormGRU(3, 8, bidirectional=True)),
    "skip gru": ("gru", "l0", lambda: ours.SkipGRU(3, 8)),
    "temporal skip gru": ("gru", "l0", lambda: ours.TemporalSkipRNN(3, 8, skip=4, cell="gru")),
    "temporal skip": ("tanh", "l0", lambda: ours.TemporalSkipRNN(3, 8, skip=4)),
    "leaky": ("leaky_relu", "l1", lambda: ours.RNN(3, 8, 2, nonlinearity="leaky_relu")),
    "prelu": ("prelu", "l0", lambda: ours.RNN(3, 8, nonlinearity="prelu")),
    "dilated lstm": ("lstm", "layers", lambda: ours.DilatedRNN(3, 8, 2)),
    "dilated gru": (
        "gru", "layers_reverse", lambda: ours.DilatedRNN(3, 8, 2, cell="gru", bidirectional=True)
    ),
    "dilated rnn": ("tanh", "layers", lambda: ours.DilatedRNN(3, 8, 2, cell="rnn")),
}  # fmt: skip


def remedies_of(
    kind: str, part: str, path: str, rate: float, *, bias: bool = True
) -> tuple[Remedy, ...]:
    about = {"kind": kind, "module": path, "part": part, "source": "exact", "bias": bias}
    findings = diagnose(run(steady(rate), stuck(), **about))
    remedies: tuple[Remedy, ...] = findings[-1].remedies
    # A start of the gates needs biases.
    starts = rate > 0.0 or bias or kind not in ("lstm", "gru") or part.startswith("layers")
    assert len(remedies) == (3 if starts else 2)
    assert len(set(remedies)) == len(remedies)
    return remedies


def run_line(remedy: Remedy, module: nn.Module, path: str) -> tuple[nn.Module, dict[str, Any]]:
    """What stands in the module's place afterwards, and everything that the line could touch."""
    assert re.fullmatch(r"[A-Z][^.]*\.", remedy.sentence), remedy.sentence
    scope: dict[str, Any] = {
        "torch": torch,
        "model": inside(path, module),
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
        "sequence": torch.zeros(120, 3),
        "output": torch.zeros(5, 120, 8),
        "Trainer": lambda callbacks: callbacks,
        "GradGuard": lambda: None,
    }
    exec(compile(remedy.code, "remedy", "exec"), scope)
    return scope["model"].get_submodule(path) if path else scope["model"], scope


def runs(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output for ``(T, B, 3)``, in this layout too."""
    first = getattr(module, "batch_first", False)
    output: torch.Tensor = module(x.transpose(0, 1) if first else x)[0]
    return output.transpose(0, 1) if first else output


def check_line(remedy: Remedy, module: nn.Module, path: str) -> None:
    """Each line does what its sentence says."""
    before = {name: p.clone() for name, p in module.named_parameters()}
    now, scope = run_line(remedy, module, path)
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    if now is not module:
        check_replaced(remedy, module, now)
    elif "attention" in remedy.sentence:
        check_attention(scope["attention"], module)
    elif "sequences" in remedy.sentence:
        assert len(scope["sequence"]) == 16
    elif "bias" in remedy.sentence:
        assert changed
        assert all("bias" in name for name in changed)
        check_chrono(now)
    elif "recurrent weights" in remedy.sentence and "learning rate" not in remedy.sentence:
        assert changed
        assert all("weight_hh" in name for name in changed)
        for name in changed:
            for weight in dict(module.named_parameters())[name].split(8):
                assert torch.allclose(weight @ weight.T, torch.eye(8), atol=1e-5)


def check_replaced(remedy: Remedy, module: nn.Module, now: nn.Module) -> None:
    assert remedy.sentence.startswith("Before the optimizer is made, ")
    if "gated" in remedy.sentence:
        assert isinstance(now, nn.GRU | nn.GRUCell)
        check_chrono(now)
    else:
        assert isinstance(now, ours.DilatedRNN)
        assert now.dilations == (1, 2, 4, 8, 16, 32)
        assert now.cell == getattr(module, "cell", "rnn")
    if not isinstance(module, nn.RNNCellBase):
        x = torch.randn(120, 2, 3)
        assert runs(now, x).shape == runs(module, x).shape


def check_attention(attention: nn.Module, module: nn.Module) -> None:
    if isinstance(module, nn.RNNCellBase):
        assert attention.hidden_size == 8
        return
    x = torch.randn(7, 4, 3)
    context, weights = attention(module(x.transpose(0, 1) if module.batch_first else x)[0])
    assert context.shape[0] == 4
    assert weights.shape == (4, 7)


def check_chrono(module: nn.Module) -> None:
    most = math.log(119.0) + (1.0 if isinstance(module, ours.SkipGRU) else 0.4)  # the other bias
    for layer in recurrent_layers(module):
        bias = sum(layer.blocks(bias)["f" if "f" in layer.gates else "z"] for bias in layer.biases)
        assert -0.4 <= bias.min() <= bias.max() <= most


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "cell"])
@pytest.mark.parametrize("path", ["rnn", "encoder.rnn", "layers.0", "class.rnn", ""])
@pytest.mark.parametrize("rate", [-0.44, 0.12], ids=["vanishing", "exploding"])
def test_remedies_run_on_the_module_they_name(
    cell: str, fused: bool, path: str, rate: float
) -> None:
    part = "l1_reverse" if fused else ""
    for remedy in remedies_of(cell, part, path, rate):
        check_line(remedy, (MODULES if fused else CELLS)[cell](), path)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("path", ["rnn", "blocks.0", ""])
@pytest.mark.parametrize("rate", [-0.44, 0.12], ids=["vanishing", "exploding"])
def test_remedies_run_on_the_modules_of_this_package(name: str, path: str, rate: float) -> None:
    kind, part, make = OWN[name]
    for remedy in remedies_of(kind, part, path, rate):
        check_line(remedy, make(), path)


WITHOUT_BIASES: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "lstm": ("lstm", "l0", lambda: nn.LSTM(3, 8, bias=False)),
    "gru cell": ("gru", "", lambda: nn.GRUCell(3, 8, bias=False)),
    "tanh": ("tanh", "l0", lambda: nn.RNN(3, 8, bias=False)),
    "tanh cell": ("tanh", "", lambda: nn.RNNCell(3, 8, bias=False)),
    "layer norm gru": ("gru", "l0", lambda: ours.LayerNormGRU(3, 8, bias=False)),
    "dilated lstm": ("lstm", "layers", lambda: ours.DilatedRNN(3, 8, 2, bias=False)),
}


@pytest.mark.parametrize("name", WITHOUT_BIASES)
@pytest.mark.parametrize("rate", [-0.44, 0.12], ids=["vanishing", "exploding"])
def test_no_line_starts_gates_by_biases_that_are_not_there(name: str, rate: float) -> None:
    kind, part, make = WITHOUT_BIASES[name]
    for remedy in remedies_of(kind, part, "rnn", rate, bias=False):
        assert "biases" not in remedy.sentence
        check_line(remedy, make(), "rnn")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("module", [nn.LSTM, nn.GRUCell, ours.LayerNormLSTM, ours.DilatedRNN])
def test_readings_know_whether_there_are_biases(module: type[nn.Module], bias: bool) -> None:
    model = inside("rnn", module(3, 8, bias=bias))
    with TimestepProbe(model) as probe:
        if module is nn.GRUCell:
            h = torch.zeros(2, 8)
            for x in torch.randn(5, 2, 3):
                h = model.rnn(x, h)
        else:
            h = model.rnn(torch.randn(9, 2, 3))[0]
        h.square().sum().backward()
        readings = probe.measure()
    assert readings
    assert all(reading.bias is bias for reading in readings)


def test_of_a_module_that_is_not_known_the_lines_run_as_well() -> None:
    for rate in (-0.44, 0.12):
        found = diagnose(run(steady(rate), stuck(), kind="other", part=""))
        assert len(found[-1].remedies) >= 2
        for remedy in found[-1].remedies:
            run_line(remedy, nn.LSTM(3, 8), "rnn")


def test_a_guarded_run_is_not_told_to_be_guarded() -> None:
    *_, finding = diagnose(run(steady(0.12), stuck()))
    free, guarded = (remedies_for(finding, ModelFacts(guarded=is_so)) for is_so in (False, True))
    assert "GradGuard()" in free[0].code
    assert guarded == free[1:]


HORIZONS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "torch lstm": ("lstm", lambda: nn.LSTM(4, 24)),
    "torch gru": ("gru", lambda: nn.GRU(4, 24)),
    "torch rnn": ("tanh", lambda: nn.RNN(4, 24)),
    "residual lstm": ("lstm", lambda: ours.LSTM(4, 24, 2, residual=True)),
    "layer norm lstm": ("lstm", lambda: ours.LayerNormLSTM(4, 24)),
    "batch norm lstm": ("lstm", lambda: ours.BatchNormLSTM(4, 24, max_length=60)),
    "layer norm gru": ("gru", lambda: ours.LayerNormGRU(4, 24)),
    "residual gru": ("gru", lambda: ours.GRU(4, 24, 2, residual=True)),
    "skip lstm": ("lstm", lambda: ours.SkipLSTM(4, 24)),
    "skip gru": ("gru", lambda: ours.SkipGRU(4, 24)),
    "temporal skip": ("tanh", lambda: ours.TemporalSkipRNN(4, 24, skip=6)),
    "temporal skip lstm": ("lstm", lambda: ours.TemporalSkipRNN(4, 24, skip=6, cell="lstm")),
    "temporal skip gru": ("gru", lambda: ours.TemporalSkipRNN(4, 24, skip=6, cell="gru")),
}


def rate(model: nn.Module) -> float:
    """Of the layer or direction in which the least is lost."""
    with TimestepProbe(model) as probe:
        output = model.get_submodule("rnn")(torch.randn(60, 8, 4))[0]
        output[-1].square().sum().backward()
        return max(one.decay_rate for one in probe.measure())


def forgetful(module: nn.Module) -> nn.Module:
    """Gates that keep little of the state, so that the gradient vanishes in any of them."""
    with torch.no_grad():
        for layer in recurrent_layers(module):
            for gate in {"f", "z"} & set(layer.gates):
                layer.blocks(layer.biases[0])[gate].fill_(-3.0)
    return module


@pytest.mark.parametrize("name", HORIZONS)
def test_the_first_remedy_keeps_the_gradient_where_it_vanished(name: str) -> None:
    torch.manual_seed(0)
    kind, make = HORIZONS[name]
    model = inside("rnn", forgetful(make()))
    before = rate(model)
    first = remedies_of(kind, "l0", "rnn", -0.44)[0]
    exec(first.code, {"model": model, "torch": torch})
    assert rate(model) > 0.6 * before, first.code
    assert before < 0.0


@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_dilated_layers_are_a_shorter_way_than_what_they_replace(kind: str) -> None:
    torch.manual_seed(0)
    model = inside("rnn", nn.RNN(4, 24, nonlinearity=kind))
    before = rate(model)
    chosen = remedies_of(kind, "l0", "rnn", -0.44)
    (dilated,) = [remedy for remedy in chosen if "dilated" in remedy.sentence]
    exec(dilated.code, {"model": model, "torch": torch})
    assert rate(model) > 0.2 * before
