"""What is said of models and optimizers whose settings are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from lightning_gradguard.measure.model_facts import model_facts
from lightning_gradguard.nn import DilatedRNN, TemporalAttention


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_kinds() -> None:
    modules: dict[str, tuple[nn.Module, str]] = {
        "linear": (nn.Linear(2, 2), "linear"),
        "conv": (nn.Conv1d(2, 2, 1), "conv"),
        "transposed": (nn.ConvTranspose2d(2, 2, 1), "conv"),
        "embedding": (nn.Embedding(2, 2), "embedding"),
        "lstm": (nn.LSTM(2, 2), "lstm"),
        "gru": (nn.GRUCell(2, 2), "gru"),
        "rnn": (nn.RNN(2, 2), "rnn"),
        "batch": (nn.BatchNorm2d(2), "batch_norm"),
        "sync": (nn.SyncBatchNorm(2), "batch_norm"),
        "layer": (nn.LayerNorm(2), "layer_norm"),
        "group": (nn.GroupNorm(1, 2), "layer_norm"),
        "dropout": (nn.Dropout2d(), "dropout"),
        "attention": (nn.MultiheadAttention(2, 1), "attention"),
        "relu6": (nn.ReLU6(), "relu6"),
        "hardtanh": (nn.Hardtanh(), "hardtanh"),
        "silu": (nn.SiLU(inplace=True), "silu"),
        "leaky": (nn.LeakyReLU(), "leakyrelu"),
        "odd": (Odd(), "other"),
        "orthogonal": (orthogonal(nn.Linear(2, 2)), "linear"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in modules.items()})
    model["batch"].eval()
    facts = model_facts(model, sgd(model))
    assert dict(facts.kinds) == {name: kind for name, (_, kind) in modules.items()}
    assert list(facts.kinds) == list(modules)
    assert dict(facts.training) == {
        "batch": False, "sync": True, "layer": True, "group": True, "dropout": True,
    }  # fmt: skip


def test_names_are_without_wrappers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model[0] = torch.compile(model[0], backend="eager")
    assert dict(model_facts(model, sgd(model)).kinds) == {"0": "linear", "1": "tanh"}


def test_what_carries_the_gradient_back_through_time_is_named_as_a_whole() -> None:
    model = nn.ModuleDict(
        {
            "stack": DilatedRNN(2, 4, 2, cell="gru"),
            "additive": TemporalAttention(4),
            "dot": TemporalAttention(4, "dot"),
            "heads": TemporalAttention(4, "multihead", 2),
        }
    )
    assert dict(model_facts(model, sgd(model)).kinds) == {
        "stack": "dilated",
        "stack.layers.0": "gru",
        "stack.layers.1": "gru",
        "additive": "attention",
        "dot": "attention",
        "heads": "attention",
    }


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25)])
def test_settings_of_the_first_group(lr: Any) -> None:
    model = nn.Linear(2, 2)
    facts = model_facts(model, sgd(model, lr=lr, momentum=0.9, weight_decay=0.01))
    assert (facts.optimizer, facts.lr, facts.momentum) == ("SGD", 0.25, 0.9)
    assert facts.weight_decay == 0.01
    assert (facts.precision, facts.planned_steps) == ("", None)
    adam = model_facts(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert (adam.optimizer, adam.momentum) == ("AdamW", 0.0)


def test_a_rate_that_is_elsewhere_is_not_read() -> None:
    model = nn.Linear(2, 2)
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")  # reading it would raise
    assert math.isnan(model_facts(model, optimizer).lr)


def test_the_rate_is_that_before_a_scheduler_moved_it() -> None:
    model = nn.Linear(2, 2)
    optimizer = sgd(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.01)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert model_facts(model, optimizer).lr == 0.1
