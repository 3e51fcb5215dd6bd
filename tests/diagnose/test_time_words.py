"""The words of findings about time, and whether their remedies do what they say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gradguard.diagnose import Finding, Pathology, Severity
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


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "cell"])
@pytest.mark.parametrize("path", ["rnn", "encoder.rnn", "layers.0", "class.rnn", ""])
@pytest.mark.parametrize("rate", [-0.44, 0.12], ids=["vanishing", "exploding"])
def test_remedies_run_on_the_module_they_name(
    cell: str, fused: bool, path: str, rate: float
) -> None:
    """Not only valid Python: each line does what its sentence says to a real module."""
    part = "l1_reverse" if fused else ""
    findings = diagnose(run(steady(rate), stuck(), kind=cell, module=path, part=part))
    remedies = findings[-1].remedies
    assert 2 <= len(remedies) <= 3
    for remedy in remedies:
        assert re.fullmatch(r"[A-Z][^.]*\.", remedy.sentence), remedy.sentence
        compile(remedy.code, "remedy", "exec")
        if "Trainer" in remedy.code or "lr" in remedy.code:
            continue
        module = (MODULES if fused else CELLS)[cell]()
        scope: dict[str, Any] = {
            "torch": torch,
            "model": inside(path, module),
            "sequence": torch.zeros(120, 3),
        }
        before = {name: p.clone() for name, p in module.named_parameters()}
        exec(remedy.code, scope)
        now = scope["model"].get_submodule(path) if path else scope["model"]
        changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
        suffix = f"_{part}" if fused else ""
        if "gated" in remedy.sentence:
            assert isinstance(now, nn.GRU if fused else nn.GRUCell)
        elif "attention" in remedy.sentence:
            assert scope["attention"].embed_dim == 8
        elif "sequences" in remedy.sentence:
            assert len(scope["sequence"]) == 16
        elif "bias" in remedy.sentence:
            assert changed == {f"bias_hh{suffix}"}
            bias = dict(module.named_parameters())[f"bias_hh{suffix}"][8:16]
            assert 0.0 <= bias.min() <= bias.max() <= math.log(119.0)
        else:
            assert changed == {f"weight_hh{suffix}"}
            for weight in dict(module.named_parameters())[f"weight_hh{suffix}"].split(8):
                assert torch.allclose(weight @ weight.T, torch.eye(8), atol=1e-5)


def test_a_remedy_lengthens_the_horizon_it_was_found_by() -> None:
    """The chrono line, run on a real LSTM, opens its forget gates."""
    (finding,) = diagnose(run(steady(-0.44), stuck()))
    rnn = nn.LSTM(1, 110)
    x = torch.rand(120, 1, 1, requires_grad=True)

    def reach() -> float:
        (grad,) = torch.autograd.grad(rnn(x)[0][-1].sum(), x)
        return math.log(float(grad[100].norm() / grad[20].norm())) / 80

    before = reach()
    exec(finding.remedies[0].code, {"model": inside("rnn", rnn), "torch": torch})
    assert before > 0.4
    assert reach() < 0.1
