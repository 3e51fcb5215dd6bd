"""Initializers against the distributions, matrices and modules that their papers describe."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradguard.nn.init import (
    chrono_,
    forget_bias_,
    he_,
    identity_recurrent_,
    initialize,
    orthogonal_recurrent_,
    torch_,
    uniform_gate_,
    xavier_,
)
from lightning_gradguard.nn.temporal_skip import TemporalSkipRNN

EVERY: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNN(3, 5, num_layers=2, bidirectional=True, nonlinearity="relu"),
    "gru": lambda: nn.GRU(3, 5, num_layers=2, bidirectional=True),
    "lstm": lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(3, 5, num_layers=2, proj_size=2, bidirectional=True),
    "rnn cell": lambda: nn.RNNCell(3, 5),
    "gru cell": lambda: nn.GRUCell(3, 5),
    "lstm cell": lambda: nn.LSTMCell(3, 5),
    "unbiased": lambda: nn.GRU(3, 5, bias=False),
    "temporal skip": lambda: TemporalSkipRNN(3, 5, 2, skip=2, cell="gru"),
}
LSTMS = ("lstm", "projected", "lstm cell")
GATED = (*LSTMS, "gru", "gru cell")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bias_sums(module: nn.Module) -> list[Tensor]:
    """The two biases of each layer and direction together, as they act."""
    named = dict(module.named_parameters())
    return [
        (bias + named[name.replace("_ih", "_hh")]).detach()
        for name, bias in named.items()
        if "bias_ih" in name
    ]


def rows(stacked: Tensor, gate: int, size: int = 5) -> Tensor:
    return stacked[gate * size : (gate + 1) * size]


def matrices(module: nn.Module, which: str, size: int = 5) -> list[Tensor]:
    """The blocks of each gate of the weights of that name."""
    stacked = [p.detach() for name, p in module.named_parameters() if which in name]
    return [rows(w, gate, size) for w in stacked for gate in range(w.shape[0] // size)]


def changed(module: nn.Module, act: Callable[[nn.Module], object]) -> set[str]:
    """Names of the parameters in which a call changed anything."""
    before = copy.deepcopy(dict(module.named_parameters()))
    assert act(module) is module
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


# -- biases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LSTMS)
@pytest.mark.parametrize("value", [1.0, -2.5, 5])
def test_forget_bias_is_the_sum_and_nothing_else_changes(kind: str, value: float) -> None:
    module = EVERY[kind]()
    before = bias_sums(module)
    names = changed(module, lambda m: forget_bias_(m, value))
    assert all("bias" in name for name in names)
    for now, then in zip(bias_sums(module), before, strict=True):
        assert torch.equal(rows(now, 1), torch.full((5,), float(value)))
        for gate in (0, 2, 3):
            assert torch.equal(rows(now, gate), rows(then, gate))


def test_a_forget_bias_of_five_carries_the_gradient_through_time() -> None:
    def first_over_last(bias: float) -> float:
        torch.manual_seed(0)
        lstm = forget_bias_(nn.LSTM(4, 16), bias)
        x = torch.randn(60, 8, 4, requires_grad=True)
        lstm(x)[0][-1].sum().backward()
        norms = x.grad.flatten(1).norm(dim=1)
        return (norms[0] / norms[-1]).item()

    assert first_over_last(5.0) > 0.1
    assert first_over_last(0.0) < 1e-6


@pytest.mark.parametrize("kind", LSTMS)
def test_chrono_of_an_lstm(kind: str) -> None:
    module = chrono_(EVERY[kind](), 50, generator=seeded())
    for bias in bias_sums(module):
        forget = rows(bias, 1)
        assert torch.equal(rows(bias, 0), -forget)
        assert not rows(bias, 2).any()
        assert not rows(bias, 3).any()
        assert ((forget >= 0) & (forget <= math.log(49))).all()


def test_chrono_of_a_gru_sets_the_gate_that_keeps_the_state() -> None:
    cell = chrono_(nn.GRUCell(1, 400), 50, generator=seeded())
    (bias,) = bias_sums(cell)
    assert not rows(bias, 0, 400).any()
    assert not rows(bias, 2, 400).any()
    # With weights of zero, a unit keeps the share z of its state each step, and takes in nothing.
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.weight_hh.zero_()
        kept = cell(torch.zeros(1, 1), torch.ones(1, 400)).squeeze(0)
    steps = 1 / (1 - kept)
    assert steps.min() >= 2 - 1e-4
    assert steps.max() <= 50 + 1e-2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_distribution_of_what_is_kept(kind: type[nn.LSTM | nn.GRU]) -> None:
    module, levels = kind(1, 1000), torch.linspace(0.05, 0.95, 7)

    def kept() -> Tensor:
        return torch.sigmoid(rows(bias_sums(module)[0], 1, 1000))  # f and z are both second

    chrono_(module, 100, generator=seeded())
    times = 1 / (1 - kept())
    torch.testing.assert_close(times.quantile(levels), 2 + 98 * levels, rtol=0, atol=5.0)
    uniform_gate_(module, generator=seeded())
    torch.testing.assert_close(kept().quantile(levels), levels, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", GATED)
def test_uniform_gates_stay_inside_and_leave_the_others(kind: str) -> None:
    module = EVERY[kind]()
    before = bias_sums(module)
    names = changed(module, lambda m: uniform_gate_(m, generator=seeded()))
    assert all("bias" in name for name in names)
    for now, then in zip(bias_sums(module), before, strict=True):
        kept = torch.sigmoid(rows(now, 1))
        assert ((kept >= 0.2 - 1e-6) & (kept <= 0.8 + 1e-6)).all()
        if kind in LSTMS:
            assert torch.equal(rows(now, 0), -rows(now, 1))
        for gate in (2, 3) if kind in LSTMS else (0, 2):
            assert torch.equal(rows(now, gate), rows(then, gate))


@settings(max_examples=20, deadline=None)
@given(t_max=st.floats(2.001, 1e6), seed=st.integers(0, 2**31))
def test_chrono_never_leaves_its_range(t_max: float, seed: int) -> None:
    (bias,) = bias_sums(chrono_(nn.LSTM(1, 8), t_max, generator=seeded(seed)))
    forget = rows(bias, 1, 8)
    assert ((forget >= 0) & (forget <= math.log(t_max - 1) + 1e-5)).all()


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_orthogonal_blocks(kind: str, gain: float) -> None:
    module = EVERY[kind]()
    names = changed(module, lambda m: orthogonal_recurrent_(m, gain))
    assert names == {
        n for n, _ in module.named_parameters() if "weight_hh" in n or "weight_hr" in n
    }
    for block in matrices(module, "weight_hh"):
        values = torch.linalg.svdvals(block)
        torch.testing.assert_close(values, torch.full_like(values, gain))
    for projection in matrices(module, "weight_hr", size=2):
        values = torch.linalg.svdvals(projection)
        torch.testing.assert_close(values, torch.ones_like(values))


@pytest.mark.parametrize("kind", ["rnn", "rnn cell"])
def test_identity_keeps_the_state(kind: str) -> None:
    module = EVERY[kind]()
    names = changed(module, lambda m: identity_recurrent_(m, 0.5))
    assert not any("weight_ih" in name for name in names)
    assert all(torch.equal(w, 0.5 * torch.eye(5)) for w in matrices(module, "weight_hh"))
    assert not any(bias.any() for bias in bias_sums(module))


def test_identity_carries_a_state_through_relu_unchanged() -> None:
    rnn = identity_recurrent_(nn.RNN(3, 5, nonlinearity="relu"))
    state = torch.rand(1, 2, 5)
    _, end = rnn(torch.zeros(50, 2, 3), state)
    assert torch.equal(end, state)


@pytest.mark.parametrize("kind", EVERY)
def test_xavier_uses_the_fans_of_one_gate(kind: str) -> None:
    module = EVERY[kind]()
    xavier_(module, generator=seeded())
    for block in matrices(module, "weight_ih") + matrices(module, "weight_hh"):
        bound = math.sqrt(6 / sum(block.shape))
        assert 0.5 * bound < block.abs().max() <= bound
    assert not any(bias.any() for bias in bias_sums(module))


@pytest.mark.parametrize(
    ("arguments", "gain"),
    [
        ({}, math.sqrt(2)),
        ({"nonlinearity": "tanh"}, 5 / 3),
        ({"nonlinearity": "leaky_relu"}, math.sqrt(2 / (1 + 0.01**2))),
        ({"nonlinearity": "prelu"}, math.sqrt(2 / (1 + 0.25**2))),
        ({"nonlinearity": "leaky_relu", "negative_slope": 1.0}, 1.0),
    ],
)
def test_he_scales_each_gate_by_its_inputs(arguments: dict[str, object], gain: float) -> None:
    module = he_(nn.LSTM(100, 400, proj_size=50), generator=seeded(), **arguments)
    for block in matrices(module, "weight_ih", 400) + matrices(module, "weight_hh", 400):
        assert block.std().item() == pytest.approx(gain / math.sqrt(block.shape[1]), rel=0.03)
    (projection,) = matrices(module, "weight_hr", 50)
    assert projection.std().item() == pytest.approx(1 / math.sqrt(400), rel=0.03)
    assert not any(bias.any() for bias in bias_sums(module))


@pytest.mark.parametrize("kind", EVERY)
def test_torch_is_what_the_module_does_itself(kind: str) -> None:
    module, twin = EVERY[kind](), EVERY[kind]()
    torch.manual_seed(3)
    twin.reset_parameters()
    torch.manual_seed(3)
    torch_(module)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


# -- all of them ----------------------------------------------------------------------------------

CALLS: dict[str, Callable[[nn.Module, torch.Generator | None], object]] = {
    "torch": lambda m, g: torch_(m, generator=g),
    "orthogonal": lambda m, g: orthogonal_recurrent_(m, generator=g),
    "xavier": lambda m, g: xavier_(m, generator=g),
    "he": lambda m, g: he_(m, generator=g),
    "chrono": lambda m, g: chrono_(m, 30, generator=g),
    "uniform": lambda m, g: uniform_gate_(m, generator=g),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_generator_decides_and_spares_the_global_one(name: str) -> None:
    module = nn.LSTM(3, 5)
    twin = copy.deepcopy(module)
    state = torch.get_rng_state()
    CALLS[name](module, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    CALLS[name](twin, seeded(1))
    assert all(map(torch.equal, module.parameters(), twin.parameters()))
    CALLS[name](twin, seeded(2))
    assert not all(map(torch.equal, module.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_gradients(name: str, dtype: torch.dtype) -> None:
    module = nn.LSTM(3, 8, dtype=dtype)
    CALLS[name](module, None)
    for parameter in module.parameters():
        assert parameter.dtype == dtype
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert parameter.isfinite().all()


def test_modules_inside_and_other_parameters() -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size = 5
            self.layers = nn.ModuleList(nn.LSTM(5, 5) for _ in range(2))
            self.norm = nn.LayerNorm(5)

    module = Normalized()
    names = changed(module, lambda m: initialize(m, "chrono", 20))
    assert {n.split(".")[1] for n in names} == {"0", "1"}
    assert all(rows(bias, 1).min() >= 0 for bias in bias_sums(module))


# -- by name --------------------------------------------------------------------------------------

NAMES = {
    "rnn": ("torch", "orthogonal", "xavier", "he", "identity"),
    "gru": ("torch", "orthogonal", "chrono", "uniform", "xavier", "he"),
    "lstm": ("torch", "orthogonal", "chrono", "uniform", "xavier", "he"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, n) for kind in NAMES for n in NAMES[kind]])
def test_a_name_is_the_initializer_on_top_of_torch_s(kind: str, name: str) -> None:
    module, twin = EVERY[kind](), EVERY[kind]()
    initialize(module, name, 30 if name == "chrono" else None, generator=seeded())
    generator = seeded()
    torch_(twin, generator=generator)
    if name == "identity":
        identity_recurrent_(twin)
    elif name == "he":
        he_(twin, "relu" if kind == "rnn" else "tanh", generator=generator)
    elif name != "torch":
        CALLS[name](twin, generator)
    for full, parameter in module.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(full)), full


@pytest.mark.parametrize("kind", NAMES)
def test_an_unknown_name_says_what_is_allowed(kind: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of 'torch', .*, got 'kaiming'") as caught:
        initialize(EVERY[kind](), "kaiming")
    assert all(repr(name) in str(caught.value) for name in NAMES[kind])
    assert ("identity" in str(caught.value)) == (kind == "rnn")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: forget_bias_(nn.GRU(3, 5)), "forget_bias_ takes only an LSTM, got GRU"),
        (lambda: forget_bias_(nn.LSTM(3, 5, bias=False)), "needs biases, got LSTM with bias=False"),
        (lambda: forget_bias_(nn.LSTM(3, 5), math.nan), "value must be a number"),
        (lambda: forget_bias_(nn.LSTM(3, 5), math.inf), "value must be a number"),
        (lambda: chrono_(nn.RNN(3, 5), 9), "chrono_ takes only an LSTM or a GRU, got RNN"),
        (lambda: chrono_(nn.LSTM(3, 5), 2), "t_max must be a number > 2"),
        (lambda: chrono_(nn.LSTM(3, 5), math.inf), "t_max must be a number > 2"),
        (lambda: chrono_(nn.GRU(3, 5, bias=False), 9), "needs biases"),
        (lambda: uniform_gate_(nn.RNNCell(3, 5)), "takes only an LSTM or a GRU, got RNNCell"),
        (lambda: uniform_gate_(nn.LSTM(3, 1)), "hidden_size must be an integer >= 2, got 1"),
        (lambda: identity_recurrent_(nn.LSTM(3, 5)), "takes only an Elman RNN, got LSTM"),
        (lambda: orthogonal_recurrent_(nn.GRU(3, 5), 0.0), "gain must be a number > 0"),
        (lambda: orthogonal_recurrent_(nn.Linear(3, 5)), "must have recurrent parameters"),
        (lambda: he_(nn.RNN(3, 5), "swish"), "nonlinearity must be one of"),
        (
            lambda: he_(nn.RNN(3, 5), negative_slope=0.1),
            "must be left out with nonlinearity='relu'",
        ),
        (lambda: initialize(nn.LSTM(3, 5), "chrono"), "t_max must be given with init='chrono'"),
        (
            lambda: initialize(nn.LSTM(3, 5), "torch", 9),
            "must be left out with init='torch', got 9",
        ),
    ],
)
def test_bad_arguments(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got 3"):
        xavier_(3)
    with pytest.raises(TypeError, match="t_max must be a number > 2"):
        chrono_(nn.LSTM(3, 5), "long")


def test_modules_that_only_look_recurrent() -> None:
    class Odd(nn.Module):
        def __init__(self, rows: int, size: int | None) -> None:
            super().__init__()
            self.weight_ih, self.weight_hh = nn.Linear(3, rows).weight, nn.Linear(5, rows).weight
            if size is not None:
                self.hidden_size = size

    with pytest.raises(
        ValueError, match=r"must have 1, 3 or 4 times hidden_size=5 rows.*\(10, 5\)"
    ):
        torch_(Odd(10, 5))
    with pytest.raises(ValueError, match="integer hidden_size >= 1, got Odd without"):
        torch_(Odd(20, None))
    torch_(Odd(20, 5))
    hollow = Odd(20, 5)
    del hollow.weight_ih
    with pytest.raises(ValueError, match="must have weight_ih next to weight_hh, got Odd"):
        torch_(hollow)
