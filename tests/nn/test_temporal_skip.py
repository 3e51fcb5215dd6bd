"""TemporalSkipRNN against its equations, h_t = f(x_t, h_{t-1}, h_{t-k}), as a plain loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.nn._scan import Trace
from lightning_gradguard.nn.temporal_skip import TemporalSkipRNN
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

FUSED: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def make(kind: str, skip: int = 3, **arguments: object) -> TemporalSkipRNN:
    torch.manual_seed(0)
    arguments = {"dtype": torch.float64, **arguments}
    return TemporalSkipRNN(I, H, cell=kind, skip=skip, **arguments)


def delays_of(rnn: TemporalSkipRNN) -> Delays:
    """W_hh h_{t-1} + W_sh h_{t-k} in every gate."""

    def equation_of(layer: int, suffix: str) -> Equation:
        end = f"_l{layer}{suffix}"
        w = {n.removesuffix(end): p for n, p in rnn.named_parameters() if n.endswith(end)}

        def equation(x: Tensor, hs: list[Tensor], cs: list[Tensor]) -> tuple[Tensor, Tensor]:
            pairs = zip(w["weight_hh"].split(H), w["weight_sh"].split(H), strict=True)
            seen = [W @ hs[-1] + V @ hs[-rnn.skip] for W, V in pairs]
            return next_state(rnn.cell, w, x, seen, hs[-1], cs[-1])

        return equation

    parts = rnn.num_layers * (1 + rnn.bidirectional)
    return Delays([rnn.skip] * parts, [1] * parts, equation_of)


# -- the equations --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", [False, True])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_it_follows_its_equations(
    kind: str, layout: str, bidirectional: bool, data: st.DataObject
) -> None:
    rnn = make(
        kind,
        data.draw(st.integers(2, 5)),
        num_layers=data.draw(st.integers(1, 2)),
        bias=data.draw(st.booleans()),
        residual=data.draw(st.booleans()),
        bidirectional=bidirectional,
        batch_first=layout == "batch first",
    )
    lengths, from_zero = data.draw(lengths_of(layout)), data.draw(st.booleans())
    check_against_loop(rnn, kind, delays_of(rnn), lengths, layout, from_zero=from_zero)


@pytest.mark.parametrize("kind", KINDS)
def test_without_weights_for_the_skip_it_is_the_module_of_torch(kind: str) -> None:
    rnn, plain = make(kind, num_layers=2), FUSED[kind](I, H, 2, dtype=torch.float64)
    missing, unexpected = rnn.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["weight_sh_l0", "weight_sh_l1"], [])
    for name in missing:
        nn.init.zeros_(getattr(rnn, name))
    x = torch.randn(6, 2, I, dtype=torch.float64)
    torch.testing.assert_close(rnn(x)[0], plain(x)[0])


def test_relu() -> None:
    rnn, plain = make("rnn", nonlinearity="relu"), nn.RNN(I, H, nonlinearity="relu").double()
    rnn.load_state_dict(plain.state_dict(), strict=False)
    nn.init.zeros_(rnn.weight_sh_l0)
    x = torch.randn(6, 2, I, dtype=torch.float64)
    torch.testing.assert_close(rnn(x)[0], plain(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    rnn = make(kind, 2)
    x = torch.randn(5, 1, I, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 1, H, dtype=torch.float64, requires_grad=True)
    cell = torch.randn(1, 1, H, dtype=torch.float64, requires_grad=True)
    pair = kind == "lstm"
    assert torch.autograd.gradcheck(
        lambda x, h, c: rnn(x, (h, c) if pair else h)[0] + 0 * c.sum(), (x, hidden, cell)
    )


def test_the_skip_alone_reaches_every_k_th_timestep() -> None:
    rnn, x = make("rnn", 4), torch.randn(10, 1, I, dtype=torch.float64, requires_grad=True)
    nn.init.zeros_(rnn.weight_hh_l0)
    rnn(x)[0][-1].sum().backward()
    assert x.grad.abs().sum((1, 2)).nonzero().flatten().tolist() == [1, 5, 9]


def test_the_gradient_is_carried_further_than_without_the_skip() -> None:
    rnn = make("rnn", 10)
    x = torch.randn(100, 4, I, dtype=torch.float64, requires_grad=True)
    nn.init.eye_(rnn.weight_sh_l0)
    (skipping,) = torch.autograd.grad(rnn(x)[0][-1].sum(), x)
    nn.init.zeros_(rnn.weight_sh_l0)
    (plain,) = torch.autograd.grad(rnn(x)[0][-1].sum(), x)
    assert skipping[9].norm() > 1e6 * plain[9].norm()


# -- state and sequences --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.integers(1, 6), min_size=1, max_size=4), skip=st.integers(2, 5))
def test_chunks_of_any_lengths_equal_one_run(kind: str, chunks: list[int], skip: int) -> None:
    rnn = make(kind, skip, num_layers=2)
    x = torch.randn(sum(chunks), 2, I, dtype=torch.float64)
    output, state = [], None
    for chunk in x.split(chunks):
        made, state = rnn(chunk, state)
        output.append(made)
    torch.testing.assert_close((torch.cat(output), state), rnn(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_holds_the_last_states_oldest_first(kind: str) -> None:
    rnn = make(kind, 3, num_layers=2)
    output, state = rnn(torch.randn(7, 2, I, dtype=torch.float64))
    h_n = state[0] if kind == "lstm" else state
    assert h_n.shape == (2 * 3, 2, H)
    torch.testing.assert_close(h_n[3:], output[-3:], rtol=0, atol=0)
    if kind == "lstm":
        assert state[1].shape == (2, 2, H)


@pytest.mark.parametrize("junk", [0.0, -7.0, float("nan")])
def test_padding_never_changes_a_result(junk: float) -> None:
    rnn = make("gru", batch_first=True, bidirectional=True)
    x = torch.randn(2, 6, I, dtype=torch.float64)
    padded = x.clone()
    padded[1, 4:] = junk
    packed = pack_padded_sequence(padded, [6, 4], batch_first=True)
    output = taken_apart(rnn(packed)[0], "packed")
    torch.testing.assert_close(output, [rnn(x[0])[0], rnn(x[1, :4])[0]])


# -- while it is watched --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["time first", "packed"])
def test_a_trace_changes_no_bit(kind: str, layout: str) -> None:
    rnn = make(kind, 3, num_layers=2, bidirectional=True, dtype=torch.float32)
    sequences = [torch.randn(n, I) for n in ([9, 9] if layout == "time first" else [5, 9, 2])]
    hidden = torch.randn(4 * 3, len(sequences), H, requires_grad=True)
    cell = torch.randn(4, len(sequences), H, requires_grad=True)
    leaves = [*rnn.parameters(), hidden, *([cell] if kind == "lstm" else [])]

    def run(trace: Trace | None) -> list[Tensor]:
        rnn.recording = trace
        hx = (hidden, cell) if kind == "lstm" else hidden
        output, last = rnn(laid_out(sequences, layout), hx)
        made = [*taken_apart(output, layout), *(last if kind == "lstm" else [last])]
        made = [value.square() for value in made]
        weights = [torch.ones_like(value) for value in made]
        return [*made, *torch.autograd.grad(made, leaves, weights)]

    trace = Trace(lambda trace, gradients: None)
    traced = run(trace)
    assert len(trace.steps) == 4 * 9
    assert all(map(torch.equal, traced, run(None)))


def test_each_layer_is_watched_by_the_probe() -> None:
    rnn = make("rnn", 5, num_layers=2, dtype=torch.float32)
    probe = TimestepProbe(rnn)
    rnn(torch.randn(20, 4, I))[0][-1].sum().backward()
    readings = probe.measure()
    assert [(r.part, r.timesteps, r.source) for r in readings] == [
        ("l0", 20, "exact"), ("l1", 20, "exact"),
    ]  # fmt: skip
    probe.close()


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cell": "LSTM"}, ValueError, "cell must be one of 'rnn', 'gru', 'lstm', got 'LSTM'"),
        ({"skip": 1}, ValueError, "skip must be an integer >= 2, got 1"),
        ({"skip": 2.0}, TypeError, "skip must be an integer >= 2, got 2.0"),
        ({"nonlinearity": "sin"}, ValueError, "nonlinearity must be one of 'tanh', 'relu'"),
        (
            {"cell": "gru", "nonlinearity": "relu"},
            ValueError,
            "nonlinearity must be left out with cell='gru', got 'relu'",
        ),
        ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
        ({"residual": 1}, TypeError, "residual should be of type bool"),
    ],
)
def test_a_bad_argument_is_named(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TemporalSkipRNN(**{"input_size": I, "hidden_size": H, "skip": 2, **arguments})


@pytest.mark.parametrize(
    ("kind", "hx", "message"),
    [
        ("gru", torch.zeros(1, 2, H), r"Expected hidden size \(3, 2, 3\), got \[1, 2, 3\]"),
        ("gru", torch.zeros(3, H), r"3-D input, hx should also be 3-D but got 2-D .* \[3, 3\]"),
        ("lstm", torch.zeros(3, 2, H), "Expected hx to be h and c, got 1 tensors"),
        (
            "lstm",
            (torch.zeros(3, 2, H), torch.zeros(3, 2, H)),
            r"Expected hidden\[1\] size \(1, 2, 3\), got \[3, 2, 3\]",
        ),
    ],
)
def test_a_bad_state_is_named(kind: str, hx: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        TemporalSkipRNN(I, H, cell=kind, skip=3)(torch.randn(4, 2, I), hx)


def test_a_bad_input_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"input_size. Expected 2, got 3"):
        make("rnn")(torch.randn(4, 2, I + 1, dtype=torch.float64))


# -- how it is used -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["time first", "packed"])
def test_it_trains_under_autocast(kind: str, layout: str) -> None:
    rnn = make(kind, num_layers=2, bidirectional=True, dtype=torch.float32)
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


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_compiled(kind: str) -> None:
    rnn, x = make(kind), torch.randn(5, 2, I, dtype=torch.float64)
    compiled = torch.compile(rnn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), rnn(x))
    weights = list(rnn.parameters())
    by_compiled, by_eager = (torch.autograd.grad(f(x)[0].sum(), weights) for f in (compiled, rnn))
    torch.testing.assert_close(by_compiled, by_eager)


def test_copies_are_equal() -> None:
    rnn, x = make("lstm", bidirectional=True), torch.randn(5, 2, I, dtype=torch.float64)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        torch.testing.assert_close(twin(x), rnn(x), rtol=0, atol=0)


def test_repr_says_what_differs_from_the_defaults() -> None:
    assert make("rnn").extra_repr() == "2, 3, skip=3"
    rnn = make("rnn", 5, num_layers=2, nonlinearity="relu")
    assert rnn.extra_repr() == "2, 3, num_layers=2, skip=5, nonlinearity='relu'"
    assert make("gru").extra_repr() == "2, 3, skip=3, cell='gru'"
