"""Names of parameters and of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_gradguard.measure import NormMeter, clean_name, grad_norms, layer_index


def test_wrapped_model_has_the_names_of_the_bare_one() -> None:
    bare = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    names = tuple(name for name, _ in bare.named_parameters())
    inner = nn.Sequential(checkpoint_wrapper(bare[0]), torch.compile(bare[1], backend="eager"))
    wrapped = torch.compile(inner, backend="eager")
    assert next(iter(wrapped.named_parameters()))[0].startswith("_orig_mod.")
    assert NormMeter(wrapped.named_parameters()).names == names


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("weight", "weight"),
        ("_orig_mod.weight", "weight"),
        ("a._orig_mod.b._checkpoint_wrapped_module.weight", "a.b.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("a._orig_mod", "a._orig_mod"),
    ],
)
def test_clean_name(raw: str, clean: str) -> None:
    assert clean_name(raw) == clean


@pytest.mark.parametrize(
    ("depth", "groups", "numbers"),
    [
        (None, ["token", "encoder.rnn", "encoder.rnn.gate", "head"], [0, 1, 1, 2, 3]),
        (1, ["token", "encoder", "head"], [0, 1, 1, 1, 2]),
        (2, ["token", "encoder.rnn", "head"], [0, 1, 1, 1, 2]),
        (9, ["token", "encoder.rnn", "encoder.rnn.gate", "head"], [0, 1, 1, 2, 3]),
    ],
)
def test_layer_index(depth: int | None, groups: list[str], numbers: list[int]) -> None:
    names = [
        "token",
        "encoder.rnn.weight_ih_l0",
        "encoder.rnn.bias_ih_l0",
        "encoder.rnn.gate.weight",
        "head.weight",
    ]
    assert layer_index(names, depth) == (groups, numbers)


def test_parametrized_tensor_belongs_to_its_module() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    model(torch.ones(1, 2)).sum().backward()
    assert list(grad_norms(model).layers()) == ["0"]
    root = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, bias=False))
    assert layer_index([name for name, _ in root.named_parameters()]) == (["weight"], [0, 0])


@pytest.mark.parametrize(("depth", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_bad_depth(depth: float, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"depth must be .*got {depth}"):
        grad_norms(nn.Linear(1, 1)).layers(depth)


def test_layer_values_are_the_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norms = grad_norms(model)
    names, values = norms.layer_values()
    assert dict(zip(names, values.tolist(), strict=True)) == norms.layers()
    assert values.dtype == norms.values.dtype
