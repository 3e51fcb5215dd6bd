"""DilatedRNN against its definition, c_t = f(x_t, c_{t-s}), written as a plain loop."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.nn.dilated import DilatedRNN
from lightning_gradguard.nn.init import initialize
from tests.nn.delayed_loop import (
    KINDS,
    LAYOUTS,
    Delays,
    Equation,
    H,
    I,
    check_against_loop,
    laid_out,
    lengths_of,
    next_state,
    taken_apart,
)

FUSED = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def make(kind: str, dilations: tuple[int, ...] = (1, 3), **arguments: object) -> DilatedRNN:
    torch.manual_seed(0)
    arguments = {"dtype": torch.float64, **arguments}
    return DilatedRNN(I, H, len(dilations), cell=kind, dilations=dilations, **arguments)


def delays_of(rnn: DilatedRNN) -> Delays:
    """c_t^(l) = f(x_t^(l), c_{t - s_l}^(l)), with c all of the state."""

    def equation_of(layer: int, suffix: str) -> Equation:
        child = rnn.layers_reverse[layer] if suffix else rnn.layers[layer]
        w, s = {name[:-3]: p for name, p in child.named_parameters()}, rnn.dilations[layer]

        def equation(x: Tensor, hs: list[Tensor], cs: list[Tensor]) -> tuple[Tensor, Tensor]:
            seen = [W @ hs[-s] for W in w["weight_hh"].split(H)]
            return next_state(rnn.cell, w, x, seen, hs[-s], cs[-s])

        return equation

    counts = [s for s in rnn.dilations for _ in range(1 + rnn.bidirectional)]
    return Delays(counts, counts, equation_of)


# -- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", [False, True])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_it_is_its_definition(
    kind: str, layout: str, bidirectional: bool, data: st.DataObject
) -> None:
    dilations = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    rnn = make(
        kind,
        tuple(dilations),
        bias=data.draw(st.booleans()),
        residual=data.draw(st.booleans()),
        bidirectional=bidirectional,
        batch_first=layout == "batch first",
    )
    lengths, from_zero = data.draw(lengths_of(layout)), data.draw(st.booleans())
    check_against_loop(rnn, kind, delays_of(rnn), lengths, layout, from_zero=from_zero)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["time first", "packed"])
def test_so_it_is_in_single_precision(kind: str, layout: str) -> None:
    rnn = make(kind, (1, 2, 4), bidirectional=True, dtype=torch.float32)
    lengths = [11, 11, 11] if layout == "time first" else [7, 11, 2]
    check_against_loop(rnn, kind, delays_of(rnn), lengths, layout, tolerance=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_dilation_it_is_the_module_of_torch(kind: str) -> None:
    rnn, plain = make(kind, (1,)), FUSED[kind](I, H, dtype=torch.float64)
    plain.load_state_dict(rnn.layers[0].state_dict())
    x = torch.randn(6, 2, I, dtype=torch.float64)
    torch.testing.assert_close(rnn(x), plain(x), rtol=0, atol=0)


def test_gradcheck() -> None:
    rnn = make("lstm", (3,))
    x = torch.randn(5, 1, I, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(3, 1, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x, h, c: rnn(x, (h, c))[0], (x, *hx))


def test_only_every_s_th_timestep_reaches_the_last_one() -> None:
    rnn, x = make("gru", (4,)), torch.randn(10, 1, I, dtype=torch.float64, requires_grad=True)
    rnn(x)[0][-1].sum().backward()
    assert x.grad.abs().sum((1, 2)).nonzero().flatten().tolist() == [1, 5, 9]


# -- state and sequences --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    dilations=st.lists(st.integers(1, 5), min_size=1, max_size=2),
)
def test_chunks_of_any_lengths_equal_one_run(
    kind: str, chunks: list[int], dilations: list[int]
) -> None:
    rnn = make(kind, tuple(dilations))
    x = torch.randn(sum(chunks), 2, I, dtype=torch.float64)
    output, state = [], None
    for chunk in x.split(chunks):
        made, state = rnn(chunk, state)
        output.append(made)
    torch.testing.assert_close((torch.cat(output), state), rnn(x), rtol=1e-12, atol=1e-12)


def test_the_state_holds_the_last_states_of_each_layer_oldest_first() -> None:
    rnn = make("gru", (2, 3))
    output, h_n = rnn(torch.randn(7, 2, I, dtype=torch.float64))
    assert h_n.shape == (2 + 3, 2, H)
    torch.testing.assert_close(h_n[2:], output[-3:], rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(lengths=lengths_of("packed"), bidirectional=st.booleans())
def test_each_of_packed_sequences_is_as_alone(lengths: list[int], bidirectional: bool) -> None:
    rnn = make("lstm", (2, 3), bidirectional=bidirectional)
    sequences = [torch.randn(length, I, dtype=torch.float64) for length in lengths]
    output, (h_n, c_n) = rnn(laid_out(sequences, "packed"))
    for b, (x, own) in enumerate(zip(sequences, taken_apart(output, "packed"), strict=True)):
        alone, (h, c) = rnn(x)
        torch.testing.assert_close((own, h_n[:, b], c_n[:, b]), (alone, h, c))


@pytest.mark.parametrize("junk", [0.0, -7.0, float("nan")])
def test_padding_never_changes_a_result(junk: float) -> None:
    rnn = make("gru", (1, 2), batch_first=True, bidirectional=True)
    x = torch.randn(2, 6, I, dtype=torch.float64)
    padded = x.clone()
    padded[1, 4:] = junk
    packed = pack_padded_sequence(padded, [6, 4], batch_first=True)
    output = taken_apart(rnn(packed)[0], "packed")
    torch.testing.assert_close(output, [rnn(x[0])[0], rnn(x[1, :4])[0]])


def test_dropout_is_between_layers_and_in_training_only() -> None:
    torch.manual_seed(0)
    rnn = DilatedRNN(I, H, 2, dropout=0.9, cell="gru")
    first, x = DilatedRNN(I, H, cell="gru"), torch.randn(9, 2, I)
    first.layers[0].load_state_dict(rnn.layers[0].state_dict())
    (trained, h_n), between = rnn(x), first(x)[0]
    torch.testing.assert_close(h_n[0], between[-1])
    assert not torch.allclose(trained, rnn.eval()(x)[0])
    torch.testing.assert_close(rnn(x), rnn(x), rtol=0, atol=0)


# -- what it is made of ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_its_layers_are_torchs_own_and_know_their_dilation(kind: str) -> None:
    rnn = DilatedRNN(I, H, 3, cell=kind, bidirectional=True)
    assert rnn.dilations == (1, 2, 4)
    children = dict(rnn.named_modules())
    for name, twin in zip(("layers.2", "layers_reverse.1"), (4, 2), strict=True):
        assert type(children[name]) is FUSED[kind]
        assert copy.deepcopy(children[name]).timesteps_per_step == twin
    assert sum(isinstance(child, nn.RNNBase) for child in rnn.modules()) == 6


def test_each_layer_is_watched_by_the_probe() -> None:
    rnn = DilatedRNN(I, H, 3, dilations=(1, 2, 4))
    probe = TimestepProbe(rnn)
    assert probe.names == ("layers.0", "layers.1", "layers.2")
    rnn(torch.randn(18, 4, I))[0][-1].sum().backward()
    readings = {reading.module: reading for reading in probe.measure()}
    assert {name: r.timesteps for name, r in readings.items()} == {
        "layers.0": 18, "layers.1": 18, "layers.2": 16,
    }  # fmt: skip
    assert all(reading.source == "exact" for reading in readings.values())


def test_rates_are_those_of_timesteps() -> None:
    """A layer that loses as much in each of its steps loses half of it per timestep with s = 2."""
    rnn = DilatedRNN(I, H, 1, cell="rnn", dilations=(2,), bias=False)
    with torch.no_grad():
        rnn.layers[0].weight_ih_l0.mul_(1e-3)  # tanh is the identity then
        rnn.layers[0].weight_hh_l0.copy_(0.81 * torch.eye(H))
    with TimestepProbe(rnn) as probe:
        rnn(torch.randn(20, 4, I))[0][-2:].sum().backward()
        (reading,) = probe.measure()
    assert reading.decay_rate == pytest.approx(math.log(0.9), rel=1e-3)
    probe.close()


def test_initializers_reach_its_layers() -> None:
    rnn = initialize(DilatedRNN(I, H, 2, cell="rnn"), "identity")
    assert all(torch.equal(child.weight_hh_l0, torch.eye(H)) for child in rnn.layers)
    rnn.reset_parameters()
    assert not any(torch.equal(child.weight_hh_l0, torch.eye(H)) for child in rnn.layers)


def test_repr_says_what_differs_from_the_defaults() -> None:
    rnn = DilatedRNN(I, H, 2, cell="gru", residual=True)
    assert rnn.extra_repr() == "2, 3, num_layers=2, cell='gru', dilations=(1, 2), residual=True"


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cell": "LSTM"}, ValueError, "cell must be one of 'lstm', 'gru', 'rnn', got 'LSTM'"),
        ({"dilations": 2}, TypeError, "dilations must be a sequence of integers, got 2"),
        ({"dilations": (0,)}, ValueError, r"dilations\[0\] must be an integer >= 1, got 0"),
        ({"dilations": (1.0,)}, TypeError, r"dilations\[0\] must be an integer >= 1, got 1.0"),
        ({"dilations": (1, 2)}, ValueError, r"dilations must be 1 in number, .* got \(1, 2\)"),
        ({"residual": 1}, TypeError, "residual must be a bool, got 1"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
        ({"dropout": 2.0}, ValueError, "dropout should be a number in range"),
    ],
)
def test_a_bad_argument_is_named(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DilatedRNN(**{"input_size": I, "hidden_size": H, **arguments})


@pytest.mark.parametrize("shape", [(4,), (4, 2, I + 1), (0, 2, I), (1, 4, 2, I)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bad_input_gets_the_message_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(shape, dtype=dtype)
    with pytest.raises((RuntimeError, ValueError)) as of_torch:
        nn.RNN(I, H)(x)
    with pytest.raises(type(of_torch.value)) as of_ours:
        DilatedRNN(I, H, cell="rnn")(x)
    assert str(of_ours.value) == str(of_torch.value).replace("RNN:", "DilatedRNN:")


@pytest.mark.parametrize(
    ("kind", "hx", "message"),
    [
        ("gru", torch.zeros(2, 2, H), r"Expected hidden size \(3, 2, 3\), got \[2, 2, 3\]"),
        ("gru", torch.zeros(3, H), r"3-D input, hx should also be 3-D but got 2-D .* \[3, 3\]"),
        ("gru", torch.zeros(3, 2, H).double(), "same dtype|[Dd]ouble"),
        ("lstm", torch.zeros(3, 2, H), "Expected hx to be h and c, got 1 tensors"),
        (
            "lstm",
            (torch.zeros(3, 2, H), torch.zeros(1, 2, H)),
            r"Expected hidden\[1\] size \(3, 2, 3\), got \[1, 2, 3\]",
        ),
    ],
)
def test_a_bad_state_is_named(kind: str, hx: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        DilatedRNN(I, H, cell=kind, dilations=(3,))(torch.randn(4, 2, I), hx)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_may_be_empty(kind: str) -> None:
    rnn = make(kind, (1, 3), dtype=torch.float32)
    output, state = rnn(torch.zeros(7, 0, I))
    assert output.shape == (7, 0, H)
    h_n = state[0] if isinstance(state, tuple) else state
    assert h_n.shape == (4, 0, H)


# -- how it is used -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["time first", "packed"])
def test_it_trains_under_autocast(kind: str, layout: str) -> None:
    rnn = make(kind, (1, 2, 4), bidirectional=True, dtype=torch.float32)
    sequences = [torch.randn(9, I), torch.randn(9, I)]
    exact, _ = rnn(laid_out(sequences, layout))
    with torch.autocast("cpu", torch.bfloat16):
        _, state = rnn(laid_out(sequences, layout))
        output, _ = rnn(laid_out(sequences, layout))
        rnn(laid_out(sequences, layout), state)
        torch.cat(taken_apart(output, layout)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rnn.parameters())
    torch.testing.assert_close(
        torch.cat(taken_apart(output, layout)).float(), torch.cat(taken_apart(exact, layout)),
        rtol=0.05, atol=0.02,
    )  # fmt: skip


# After the kernels of torch, which break the graph; its own filter for this does not bear errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_compiled(kind: str) -> None:
    rnn, x = make(kind, (1, 2)), torch.randn(5, 2, I, dtype=torch.float64)
    compiled = torch.compile(rnn, backend="eager")
    torch.testing.assert_close(compiled(x), rnn(x))
    weights = list(rnn.parameters())
    by_compiled, by_eager = (torch.autograd.grad(f(x)[0].sum(), weights) for f in (compiled, rnn))
    torch.testing.assert_close(by_compiled, by_eager)


def test_copies_are_equal() -> None:
    rnn, x = make("lstm", bidirectional=True), torch.randn(5, 2, I, dtype=torch.float64)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        torch.testing.assert_close(twin(x), rnn(x), rtol=0, atol=0)
    other = make("lstm", bidirectional=True)
    other.reset_parameters()
    other.load_state_dict(rnn.state_dict())
    torch.testing.assert_close(other(x), rnn(x), rtol=0, atol=0)
