from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

from lightning_gradguard.nn._scan import Trace
from lightning_gradguard.nn._skip_cell import round_half_up
from lightning_gradguard.nn.skip import (
    SkipGRU,
    SkipGRUState,
    SkipLSTM,
    SkipLSTMState,
    skip_budget_loss,
    update_share,
)
from tests.nn.skip_reference import Twin, gru, lstm

F, H = 3, 4
KINDS = [SkipLSTM, SkipGRU]
# layers, bidirectional, share_gate: all that there are
STACKS = [
    (1, False, True),
    (1, False, False),
    (1, True, True),
    (1, True, False),
    (2, False, True),
    (2, False, False),
    (2, True, False),
]
kinds = pytest.mark.parametrize("kind", KINDS)
stacks = pytest.mark.parametrize(("layers", "bidirectional", "share_gate"), STACKS)


def lively(kind, layers=1, bidirectional=False, share_gate=True, **options):
    """A module that updates at some timesteps and copies at others, in float64."""
    torch.manual_seed(0)
    options |= {"bidirectional": bidirectional, "share_gate": share_gate}
    skip = kind(F, H, layers, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in skip.named_parameters():
            if name.startswith("weight"):
                parameter.normal_(0, 4.0 if "update" in name else 0.8)
            elif name.startswith("bias_update"):
                parameter.fill_(-1.5)
            else:
                parameter.normal_(0, 0.3)
    return skip


def steady(kind, increment, layers=1, **options):
    """A module whose Δũ is always the same."""
    skip = kind(F, H, layers, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in skip.named_parameters():
            if name.startswith("weight_update"):
                parameter.zero_()
            elif name.startswith("bias_update"):
                parameter.fill_(math.log(increment / (1 - increment)))
    return skip


def each(gates):
    one = isinstance(gates, (torch.Tensor, PackedSequence))
    return [gates] if one else list(gates)


def flat(tensors):
    return [tensor.flatten() for tensor in tensors]


def own_states(state):
    """Tensors of a state without that of the gate."""
    return list(state) if isinstance(state, SkipLSTMState) else [state.h]


def given_state(skip, batch, whole=True):
    parts = skip.num_layers * (2 if skip.bidirectional else 1)
    gates = 1 if skip.share_gate and not skip.bidirectional else parts
    own = [torch.randn(parts, batch, H, dtype=torch.float64) for _ in skip.state_names[:-1]]
    return (*own, torch.rand(gates, batch, 1, dtype=torch.float64)) if whole else tuple(own)


def as_form(form, xs):
    """The same sequences as the module takes them in a form."""
    if form == "packed":
        return pack_sequence(xs, enforce_sorted=False)
    if form == "unbatched":
        return xs[0]
    return torch.stack(xs, 0 if form == "batch_first" else 1)


def alone(form, output, lengths):
    """Each sequence of what the module returned in a form."""
    if form == "packed":
        padded, known = pad_packed_sequence(output, batch_first=True)
        assert known.tolist() == lengths
        return [row[:length] for row, length in zip(padded, lengths, strict=True)]
    if form == "unbatched":
        return [output]
    return list(output if form == "batch_first" else output.transpose(0, 1))


@kinds
@stacks
@pytest.mark.parametrize("form", ["plain", "batch_first", "packed", "unbatched"])
@pytest.mark.parametrize("own", ["biases and hx", "no biases, learned state"])
def test_agrees_with_the_equations(kind, layers, bidirectional, share_gate, form, own):
    biased = own == "biases and hx"
    skip = lively(kind, layers, bidirectional, share_gate, bias=biased,
                  batch_first=form == "batch_first", learn_initial_state=not biased)  # fmt: skip
    lengths = {"packed": [5, 8, 1, 8], "unbatched": [9]}.get(form, [7, 7, 7])
    xs = [torch.randn(n, F, dtype=torch.float64, requires_grad=True) for n in lengths]
    hx = tuple(s.requires_grad_() for s in given_state(skip, len(xs)))
    passed = tuple(s.squeeze(1) for s in hx) if form == "unbatched" else hx
    output, state, gates = skip(as_form(form, xs), passed if biased else None, return_gates=True)

    weights = dict(skip.named_parameters())
    twin = Twin(lstm if kind is SkipLSTM else gru, weights, layers, 1 + bidirectional, share_gate)
    *given, first = hx
    if not biased:
        ways = ("", "_reverse")[: 1 + bidirectional]
        names = [f"_l{layer}{way}" for layer in range(layers) for way in ways]
        given = [
            torch.stack([weights[f"initial_{s}{n}"].expand(len(xs), H) for n in names])
            for s in skip.state_names[:-1]
        ]
        first = torch.ones_like(first)
    outputs, used, carried, last = twin.run(xs, given, first)

    ours = alone(form, output, lengths) + own_states(state) + [state.gate]
    theirs = [*outputs, *carried, last]
    if form == "unbatched":
        theirs = [*outputs, *(s.squeeze(1) for s in carried), last.squeeze(1)]
    for number, gate in enumerate(each(gates)):
        ours += alone(form, gate, lengths)
        theirs += [sequence[number] for sequence in used]
    assert 0 < update_share(gates) < 1
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    signals = [torch.randn_like(tensor) for tensor in theirs]
    leaves = [*xs, *weights.values(), *(hx if biased else ())]
    mine, twins = (
        torch.autograd.grad(sum(map(torch.vdot, flat(signals), flat(tensors))), leaves)
        for tensors in (ours, theirs)
    )
    torch.testing.assert_close(mine, twins, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.0, 0.0), (0.499999, 0.0), (0.5, 1.0), (0.500001, 1.0), (1.0, 1.0)]
)
def test_rounds_half_up_and_passes_the_gradient_on(value, rounded):
    p = torch.tensor(value, requires_grad=True)
    u = round_half_up(p)
    (3.0 * u).backward()
    assert u.item() == rounded
    assert p.grad.item() == 3.0


@given(st.floats(0.0, 1.0, width=32))
def test_rounding_gives_exactly_zero_or_one(value):
    assert round_half_up(torch.tensor(value)).item() == (1.0 if value >= 0.5 else 0.0)


@kinds
@pytest.mark.parametrize(
    ("increment", "expected", "following"),
    [
        (0.2, [1, 0, 0, 1, 0, 0, 1], 0.2),  # ũ = 1, .2, .4, .6, .2, .4, .6, .2
        (0.3, [1, 0, 1, 0, 1, 0], 0.6),  # ũ = 1, .3, .6, .3, .6, .3, .6
        (0.5, [1, 1, 1, 1], 0.5),  # half is rounded up
        (0.1, [1, 0, 0, 0], 0.4),
    ],
)
def test_gates_worked_by_hand(kind, increment, expected, following):
    skip = steady(kind, increment)
    _, state, gates = skip(torch.randn(len(expected), 2, F).double(), return_gates=True)
    assert gates.tolist() == [[u, u] for u in expected]
    torch.testing.assert_close(state.gate, torch.full((1, 2, 1), following).double())


@kinds
def test_probability_ends_at_one(kind):
    _, state, gates = (skip := steady(kind, 0.7))(
        torch.randn(1, 1, F).double(),
        (*given_state(skip, 1, whole=False), torch.full((1, 1, 1), 0.45).double()),
        return_gates=True,
    )
    assert gates.item() == 0
    assert state.gate.item() == 1  # .45 + min(.7, .55)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.03, 0.49), st.sampled_from(KINDS))
def test_copies_between_updates_are_known_beforehand(increment, kind):
    copies = math.ceil(0.5 / increment) - 1
    if abs(0.5 / increment - round(0.5 / increment)) < 1e-6:
        return  # whether the sum is a half is up to its rounding errors
    gates = steady(kind, increment)(torch.randn(40, F).double(), return_gates=True)[2]
    updates = gates.nonzero().squeeze(1)
    assert updates.diff().tolist() == [copies + 1] * (len(updates) - 1)


@kinds
def test_a_copied_state_stays_as_it_is_and_so_does_its_gradient(kind):
    skip = steady(kind, 0.05)
    hx = (*given_state(skip, 2, whole=False), torch.zeros(1, 2, 1).double())
    for state in hx[:-1]:
        state.requires_grad_()
    output, state = skip(torch.randn(8, 2, F).double(), hx)
    assert torch.equal(output, hx[0].expand(8, 2, H))
    signal = torch.randn(2, H).double()
    (gradient,) = torch.autograd.grad((output[-1] * signal).sum(), hx[0])
    torch.testing.assert_close(gradient[0], signal)


@kinds
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("share_gate", [True, False])
def test_is_torchs_own_module_where_it_always_updates(kind, layers, share_gate):
    # A second layer that reads the input of the first, as in an earlier port, would differ.
    own = (nn.LSTM if kind is SkipLSTM else nn.GRU)(F, H, layers)
    skip = kind(F, H, layers, share_gate=share_gate, update_bias=30.0)
    rest = skip.load_state_dict(own.state_dict(), strict=False)
    assert not rest.unexpected_keys
    assert {name.split("_l")[0] for name in rest.missing_keys} == {"weight_update", "bias_update"}
    assert not own.load_state_dict(skip.state_dict(), strict=False).missing_keys
    x = torch.randn(6, 2, F)
    expected, last = own(x)
    if kind is SkipLSTM:
        output, (h_n, c_n) = skip(x)
        torch.testing.assert_close((h_n, c_n), last)
    else:
        output, (h_n, _) = skip(x)
        torch.testing.assert_close(h_n, last)
    torch.testing.assert_close(output, expected)


@kinds
def test_layers_share_the_gate_of_the_top_layer(kind):
    skip = lively(kind, 3)
    assert [n for n in skip.state_dict() if "update" in n] == ["weight_update_l2", "bias_update_l2"]
    _, state, gates = skip(torch.randn(9, 2, F).double(), return_gates=True)
    assert gates.shape == (9, 2)
    assert state.gate.shape == (1, 2, 1)
    trace = Trace(lambda *_: None)
    skip.recording = trace
    skip(torch.randn(9, 2, F).double())
    copied = []
    for step in trace.steps:
        pairs = list(zip(step.given, step.made, strict=True))[:-1]
        copied.append(torch.stack([(given == made).all(1) for given, made in pairs]))
    assert all((layers == layers[0]).all() for layers in copied)
    assert {bool(layers[0, 0]) for layers in copied} == {True, False}


@kinds
@pytest.mark.parametrize(("layers", "share_gate"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("at", [1, 4, 8])
def test_chunks_are_one_run(kind, layers, share_gate, at):
    skip = lively(kind, layers, share_gate=share_gate)
    x = torch.randn(9, 3, F).double()
    whole, end, gates = skip(x, return_gates=True)
    first, state = skip(x[:at])
    second, state, late = skip(x[at:], state, return_gates=True)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(list(state), list(end))
    torch.testing.assert_close(state.gate, end.gate)
    for part, all_of_it in zip(each(late), each(gates), strict=True):
        assert torch.equal(part, all_of_it[at:])
    second.sum().backward()  # the state has a graph


@kinds
def test_packed_chunks_are_one_run(kind):
    skip = lively(kind, 2)
    xs = [torch.randn(n, F).double() for n in (4, 9, 6)]
    _, end = skip(pack_sequence(xs, enforce_sorted=False))
    _, state = skip(pack_sequence([x[:3] for x in xs], enforce_sorted=False))
    _, state = skip(pack_sequence([x[3:] for x in xs], enforce_sorted=False), state)
    torch.testing.assert_close(list(state), list(end))
    torch.testing.assert_close(state.gate, end.gate)


@kinds
def test_states_that_are_taken(kind):
    skip = steady(kind, 0.1)
    x = torch.randn(4, 2, F).double()
    _, state = skip(x)
    follow, _, gates = skip(x, state, return_gates=True)
    assert gates[0].tolist() == [0, 0]
    detached = state.detach()
    assert type(detached) is type(state)
    assert not any(tensor.requires_grad for tensor in (*detached, detached.gate))
    whole = (*own_states(state), state.gate)
    for same in (detached, whole, pickle.loads(pickle.dumps(detached)), copy.deepcopy(detached)):
        torch.testing.assert_close(skip(x, same)[0], follow)
    plain = own_states(state)
    for anew in (plain[0] if len(plain) == 1 else tuple(plain), plain):
        _, _, gates = skip(x, anew, return_gates=True)
        assert gates[0].tolist() == [1, 1]


def test_the_state_of_an_lstm_unpacks_as_torchs_own():
    _, (h_n, c_n) = SkipLSTM(F, H, 2)(torch.randn(5, 2, F))
    assert h_n.shape == c_n.shape == (2, 2, H)
    assert isinstance(SkipGRU(F, H)(torch.randn(5, F))[1], SkipGRUState)


@kinds
def test_a_packed_batch_is_a_padded_one_up_to_the_lengths(kind):
    skip = lively(kind, 2)
    lengths = torch.tensor([3, 6, 5])
    xs = [torch.randn(n, F).double() for n in lengths]
    packed, _, used = skip(pack_sequence(xs, enforce_sorted=False), return_gates=True)
    output, _, gates = skip(pad_sequence(xs, padding_value=7.0), return_gates=True)
    known = torch.arange(6)[:, None] < lengths
    torch.testing.assert_close(pad_packed_sequence(packed)[0], output * known[..., None])
    assert torch.equal(pad_packed_sequence(used)[0], gates * known)
    torch.testing.assert_close(
        skip_budget_loss(used, 0.3), skip_budget_loss(gates, 0.3, lengths=lengths)
    )
    torch.testing.assert_close(update_share(used), update_share(gates, lengths.tolist()))


@kinds
def test_gradcheck_where_no_gate_is_near_the_edge(kind):
    # With W_p = 0 no gate depends on what is varied, so that rounding has no part in the gradient.
    skip = steady(kind, 0.3, layers=2)
    x = torch.randn(4, 2, F, dtype=torch.float64, requires_grad=True)
    names = [n for n in dict(skip.named_parameters()) if "update" not in n]
    values = [skip.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def run(x, *values):
        output, state = torch.func.functional_call(
            skip, dict(zip(names, values, strict=True)), (x,)
        )
        return (output, *own_states(state))

    assert torch.autograd.gradcheck(run, (x, *values))


# --- the budget


def test_budget_worked_by_hand():
    gates = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    assert skip_budget_loss(gates, 0.5).item() == 1.25
    assert skip_budget_loss(gates.T, 0.5, batch_first=True).item() == 1.25
    assert skip_budget_loss((gates, gates), 0.5).item() == 2.5
    assert skip_budget_loss(gates[:, 0], 0.5).item() == 1.0
    assert skip_budget_loss(gates, 0.5, lengths=[1, 3]).item() == 1.0
    skip_budget_loss(gates, 0.5, lengths=torch.tensor([1, 3])).backward()
    assert gates.grad.tolist() == [[0.25, 0.25], [0.0, 0.25], [0.0, 0.25]]
    assert update_share(gates).item() == pytest.approx(5 / 6)
    assert update_share((gates, gates), [1, 3]).item() == 1.0
    assert not update_share(gates).requires_grad


def test_what_is_padded_does_not_reach_the_budget():
    gates = torch.tensor([[1.0, 1.0], [math.nan, 0.0]], requires_grad=True)
    loss = skip_budget_loss(gates, 1.0, lengths=[1, 2])
    loss.backward()
    assert loss.item() == 1.0
    assert gates.grad.isfinite().all()


@kinds
def test_the_budget_reaches_the_gate_straight_through(kind):
    skip = steady(kind, 0.2)
    _, _, gates = skip(torch.randn(3, 4, F).double(), return_gates=True)  # ũ = 1, Δ, 2Δ
    skip_budget_loss(gates, 0.5).backward()
    # d(Δ + 2Δ)/db, where 2Δ is (1 − u)(ũ + Δ) + u Δ and u depends on ũ = Δ too, straight-through.
    slope = 0.2 * 0.8
    expected = 0.5 * (slope + (2 * slope - slope * 0.2))
    assert skip.bias_update_l0.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), -1.0), ValueError, "cost must be a number >= 0"),
        ((torch.ones(2, 3), "much"), TypeError, "cost must be a number"),
        (
            (torch.ones(2, 3), 1.0, [1, 2]),
            ValueError,
            "lengths must be one for each of 3 sequences",
        ),
        ((torch.ones(2, 3, 4), 1.0), ValueError, r"gates must be \(T, B\) or \(T,\), got shape"),
        ((None, 1.0), TypeError, "gates must be as a Skip RNN returns them, got None"),
        ((pack_sequence([torch.ones(2)]), 1.0, [2]), ValueError, "lengths must be left out"),
    ],
)
def test_bad_arguments_of_the_budget(arguments, error, message):
    with pytest.raises(error, match=message):
        skip_budget_loss(*arguments)


@kinds
def test_a_higher_cost_trades_error_for_fewer_updates(kind):
    def trained(cost):
        torch.manual_seed(0)
        skip, head = kind(1, 16), nn.Linear(16, 1)
        optimizer = torch.optim.Adam([*skip.parameters(), *head.parameters()], lr=1e-2)
        for _ in range(150):
            x = torch.rand(12, 32, 1)
            output, _, gates = skip(x, return_gates=True)
            loss = nn.functional.mse_loss(head(output[-1]), x.mean(0))
            optimizer.zero_grad()
            (loss + skip_budget_loss(gates, cost)).backward()
            optimizer.step()
        return update_share(gates).item(), loss.item()

    (free, low), (costly, high) = trained(0.0), trained(0.03)
    assert costly < 0.7 * free
    assert low < high


# --- as a module


@kinds
def test_initial_biases(kind):
    skip = kind(F, H, 2, share_gate=False, update_bias=-0.5, learn_initial_state=True)
    for layer in range(2):
        total = skip.get_parameter(f"bias_ih_l{layer}") + skip.get_parameter(f"bias_hh_l{layer}")
        if kind is SkipLSTM:
            assert total[H : 2 * H].tolist() == [1.0] * H  # f
            assert total[:H].abs().max() > 0
        else:
            assert total[: 2 * H].tolist() == [1.0] * 2 * H  # r and z
        assert skip.get_parameter(f"bias_update_l{layer}").item() == -0.5
        assert not skip.get_parameter(f"initial_h_l{layer}").any()
    before = [name for name, _ in skip.named_parameters()]
    skip(torch.randn(4, 2, F))[0].sum().backward()
    assert [name for name, _ in skip.named_parameters()] == before  # forward makes none
    assert skip.initial_h_l1.grad.any()


@kinds
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"share_gate": 1}, TypeError, "share_gate must be a bool, got 1"),
        ({"update_bias": math.inf}, ValueError, "update_bias must be a number"),
        ({"update_bias": None}, TypeError, "update_bias must be a number"),
        (
            {"learn_initial_state": "yes"},
            TypeError,
            "learn_initial_state must be a bool, got 'yes'",
        ),
        ({"num_layers": 2, "bidirectional": True}, ValueError, "share_gate must be False with"),
        ({"num_layers": 0}, ValueError, "num_layers"),
    ],
)
def test_bad_settings(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(F, H, **options)


@kinds
@pytest.mark.parametrize(
    ("x", "states", "error", "message"),
    [
        ((5, 2, F + 1), None, RuntimeError, "input.size.-1. must be equal to input_size"),
        ((5, 2, 1, F), None, ValueError, "Expected input to be 2D or 3D, got 4D"),
        ((0, 2, F), None, RuntimeError, "Expected sequence length to be larger than 0"),
        ((5, 2, F), [(1, 3, H), (1, 2, 1)], RuntimeError, r"Expected hidden.* size \(1, 2, 4\)"),
        ((5, 2, F), [(1, 2, H), (2, 2, 1)], RuntimeError, r"Expected gate size \(1, 2, 1\)"),
        ((5, 2, F), [(1, 2, H), (1, 2)], RuntimeError, "3-D but got 2-D tensor"),
        (
            (5, 2, F),
            [(1, 2, H)] * 3,
            RuntimeError,
            "Expected hx to be h.*, with or without gate, got",
        ),
    ],
)
def test_bad_input(kind, x, states, error, message):
    skip, hx = kind(F, H), None
    if states is not None:
        own, *rest = (torch.zeros(shape) for shape in states)
        hx = (*[own] * (len(skip.state_names) - 1), *rest)
    with pytest.raises(error, match=message):
        skip(torch.zeros(x), hx)


def test_settings_are_shown():
    assert repr(SkipLSTM(3, 5)) == "SkipLSTM(3, 5)"
    shown = repr(
        SkipGRU(
            3, 5, 2, batch_first=True, share_gate=False, update_bias=2.0, learn_initial_state=True
        )
    )
    assert shown == (
        "SkipGRU(3, 5, num_layers=2, batch_first=True, share_gate=False, update_bias=2.0, "
        "learn_initial_state=True)"
    )


@kinds
@pytest.mark.parametrize("share_gate", [True, False])
def test_copies_of_the_module(kind, share_gate):
    skip = lively(kind, 2, share_gate=share_gate)
    x = torch.randn(5, 2, F).double()
    expected = skip(x)[0]
    file = io.BytesIO()
    torch.save(skip.state_dict(), file)
    file.seek(0)
    loaded = kind(F, H, 2, share_gate=share_gate, dtype=torch.float64)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for same in (copy.deepcopy(skip), pickle.loads(pickle.dumps(skip)), loaded):
        assert torch.equal(same(x)[0], expected)


@kinds
@pytest.mark.parametrize("share_gate", [True, False])
def test_dropout_between_layers_in_training_only(kind, share_gate):
    skip = lively(kind, 2, share_gate=share_gate, dropout=0.5)
    x = torch.randn(6, 2, F).double()
    assert not torch.equal(skip(x)[0], skip(x)[0])
    skip.eval()
    assert torch.equal(skip(x)[0], lively(kind, 2, share_gate=share_gate)(x)[0])


@kinds
@pytest.mark.parametrize("share_gate", [True, False])
def test_autocast_trains_and_keeps_the_gate_precise(kind, share_gate):
    skip = lively(kind, 2, share_gate=share_gate).float()
    x = torch.randn(6, 2, F)
    with torch.autocast("cpu", torch.bfloat16):
        output, state, gates = skip(x, return_gates=True)
        output, state, _ = skip(x, state, return_gates=True)
        loss = output.float().square().mean() + skip_budget_loss(gates, 0.1)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in skip.parameters())
    assert state.gate.dtype == torch.float32
    half = skip.bfloat16()
    output, state = half(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert state.gate.dtype == torch.float32


@kinds
@pytest.mark.parametrize("share_gate", [True, False])
def test_compiled(kind, share_gate):
    torch._dynamo.reset()
    skip = lively(kind, 2, share_gate=share_gate)
    compiled = torch.compile(skip, backend="eager", fullgraph=True)
    x = torch.randn(4, 2, F).double()
    expected, state, gates = skip(x, return_gates=True)
    output, others, used = compiled(x, return_gates=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(list(others), list(state))
    torch.testing.assert_close(each(used), each(gates))
    torch.testing.assert_close(compiled(x, others.detach())[0], skip(x, state)[0])
    torch._dynamo.reset()


@kinds
@stacks
def test_recording_changes_nothing_and_sees_every_state(kind, layers, bidirectional, share_gate):
    skip = lively(kind, layers, bidirectional, share_gate)
    x = torch.randn(5, 2, F).double().requires_grad_()

    def run():
        output, _, gates = skip(x, return_gates=True)
        loss = output.square().sum() + sum(skip_budget_loss(gate, 0.1) for gate in each(gates))
        return loss, torch.autograd.grad(loss, [x, *skip.parameters()], retain_graph=True)

    plain = run()
    came = []
    trace = Trace(lambda trace, gradients: came.append(gradients))
    skip.recording = trace
    torch.testing.assert_close(run(), plain)
    assert skip.recording is None
    assert len(came) == 1
    together = layers if share_gate else 1
    cells = layers * (1 + bidirectional) // together
    assert len(trace.steps) == 5 * cells
    assert {step.part for step in trace.steps} == set(range(cells))
    size = together * (len(skip.state_names) - 1) + 1
    for step in trace.steps:
        assert len(step.given) == len(step.made) == len(step.passed) == size
        tensors = (*step.given, *step.made, *step.passed)
        assert len({id(tensor) for tensor in tensors}) == 3 * size
        assert step.made[-1].shape == (2, 1)
