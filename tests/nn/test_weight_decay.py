"""Param groups of real models, and what an optimizer does with them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from lightning_gradguard.nn.temporal_skip import TemporalSkipRNN
from lightning_gradguard.nn.weight_decay import weight_decay_groups


def names_of(model: nn.Module, **arguments: float | None) -> dict[str, set[str]]:
    """Names of the parameters in each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = weight_decay_groups(model, **arguments)
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


class Reader(nn.Module):
    """A bit of everything that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.rnn = nn.LSTM(4, 5, proj_size=2, bidirectional=True)
        self.cell = nn.GRUCell(4, 5)
        self.skips = TemporalSkipRNN(4, 5, skip=2, bias=False)
        self.norm = nn.LayerNorm((3, 4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.slope = nn.PReLU()
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 7)


def test_each_parameter_where_it_belongs() -> None:
    groups = names_of(Reader(), recurrent=0.0)
    assert groups["recurrent"] == {
        "rnn.weight_hh_l0",
        "rnn.weight_hh_l0_reverse",
        "cell.weight_hh",
        "skips.weight_hh_l0",
        "skips.weight_sh_l0",
    }
    assert groups["decay"] == {
        "convolution.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_ih_l0_reverse",
        "rnn.weight_hr_l0",
        "rnn.weight_hr_l0_reverse",
        "cell.weight_ih",
        "skips.weight_ih_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    assert {
        "embedding.weight",
        "norm.weight",
        "attention.bias_k",
        "scale",
        "slope.weight",
    } < groups["no_decay"]


def test_recurrent_matrices_decay_as_others_by_default() -> None:
    groups = names_of(Reader())
    assert set(groups) == {"decay", "no_decay"}
    assert "rnn.weight_hh_l0" in groups["decay"]


@pytest.mark.parametrize("recurrent", [None, 0.0, 1e-3])
def test_every_trainable_parameter_once(recurrent: float | None) -> None:
    model = Reader()
    model.convolution.requires_grad_(False)
    groups = weight_decay_groups(model, recurrent=recurrent)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@settings(max_examples=30, deadline=None)
@given(
    order=st.permutations(["embedding", "linear", "rnn", "other"]),
    tied=st.sets(st.sampled_from(["embedding", "linear", "rnn"]), min_size=2),
)
def test_a_shared_matrix_goes_to_its_most_careful_use(order: list[str], tied: set[str]) -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 4),
            "linear": nn.Linear(4, 4, bias=False),
            "rnn": nn.RNN(4, 4, bias=False),
            "other": nn.Linear(4, 4, bias=False),
        }
    )
    shared = nn.Parameter(torch.eye(4))
    for name in tied:
        setattr(model[name], "weight_hh_l0" if name == "rnn" else "weight", shared)
    model = nn.ModuleDict({name: model[name] for name in order})
    groups = weight_decay_groups(model, recurrent=0.1)
    found = [group["name"] for group in groups for p in group["params"] if p is shared]
    assert found == ["no_decay" if "embedding" in tied else "recurrent"]


def test_an_optimizer_decays_what_it_should_and_leaves_the_rest() -> None:
    model = nn.ModuleDict({"rnn": nn.RNN(3, 4), "head": nn.Linear(4, 2)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = weight_decay_groups(model, 0.5, recurrent=0.25)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {"rnn.weight_ih_l0": 0.95, "head.weight": 0.95, "rnn.weight_hh_l0": 0.975}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), kept.get(name, 1.0) * before[name])


def test_parametrized_matrices_are_found_by_the_name_they_had() -> None:
    rnn = parametrizations.weight_norm(nn.RNN(3, 4), "weight_hh_l0")
    embedding = parametrizations.spectral_norm(nn.Embedding(3, 4))
    groups = names_of(nn.ModuleDict({"rnn": rnn, "embedding": embedding}), recurrent=0.0)
    prefix = "rnn.parametrizations.weight_hh_l0.original"
    assert groups["recurrent"] == {prefix + "0", prefix + "1"}
    assert "embedding.parametrizations.weight.original" in groups["no_decay"]


def test_empty_groups_are_left_out() -> None:
    assert list(names_of(nn.Linear(3, 4, bias=False), recurrent=0.0)) == ["decay"]
    assert list(names_of(nn.LayerNorm(3))) == ["no_decay"]
    assert weight_decay_groups(nn.ReLU()) == []


@pytest.mark.parametrize("name", ["weight_decay", "recurrent"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_bad_rates(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0"):
        weight_decay_groups(nn.Linear(1, 1), **{name: value})


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got \[\]"):
        weight_decay_groups([])


# Some versions of torch say so of every lazy module.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_must_have_seen_a_batch() -> None:
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="parameter 'weight' must have a shape"):
        weight_decay_groups(lazy)
    lazy(torch.ones(1, 2))
    assert set(names_of(lazy)) == {"decay", "no_decay"}
