"""Readings of fused recurrent modules, against what autograd says of the same modules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_gradguard.measure.adjoint import recurrent_adjoint
from lightning_gradguard.measure.decay import transport_decay
from lightning_gradguard.measure.timesteps import TimestepProbe
from tests.measure.time_readings import KINDS, B, H, I, T, cheap, input_gradient, root_mean_square

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if kind == "lstm":
        options["proj_size"] = draw(st.sampled_from([0, 2]))
    return {"kind": kind, "options": options, "layout": draw(st.sampled_from(["3d", "2d"]))}


@given(configurations(), st.booleans(), st.booleans())
def test_input_gradient_is_autograds(
    configuration: dict[str, Any], by_keyword: bool, required: bool
) -> None:
    rnn = KINDS[configuration["kind"]](I, H, **configuration["options"], dtype=torch.float64)
    unbatched = configuration["layout"] == "2d"
    batch_first = rnn.batch_first and not unbatched
    shape = (T, I) if unbatched else (B, T, I) if batch_first else (T, B, I)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=required)
    weight = torch.randn(rnn(x)[0].shape, dtype=torch.float64)

    def loss(result: Any) -> Tensor:
        return (result[0] * weight).sum()

    expected = input_gradient(rnn, x, loss).norm(dim=-1)
    expected = expected.unsqueeze(1) if unbatched else expected.T if batch_first else expected
    (reading,) = cheap(rnn, lambda: loss(rnn(input=x) if by_keyword else rnn(x)))
    assert reading.profile == pytest.approx(root_mean_square(expected))
    direct = weight.norm(dim=-1).square()
    direct = direct.unsqueeze(1) if unbatched else direct.T if batch_first else direct
    assert reading.entry == pytest.approx((direct.sum(1) / direct.sum()).tolist())
    assert (reading.timesteps, reading.sequences) == (T, 1 if unbatched else B)
    assert reading.source == "input"
    assert "several timesteps" in reading.note
    assert math.isnan(reading.decay_rate)


@given(configurations(), st.integers(0, 2**31))
def test_exact_readings_are_those_of_the_adjoint(configuration: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    rnn = KINDS[configuration["kind"]](I, H, **configuration["options"])
    unbatched = configuration["layout"] == "2d"
    batch_first = rnn.batch_first and not unbatched
    x = torch.randn((T, I) if unbatched else (B, T, I) if batch_first else (T, B, I))
    output, states = rnn(x)
    hidden = states[0] if isinstance(states, tuple) else states
    weight, last = torch.randn_like(output), torch.randn_like(hidden)

    def loss() -> Tensor:
        output, states = rnn(x)
        return (output * weight).sum() + (
            (states[0] if isinstance(states, tuple) else states) * last
        ).sum()

    adjoint = recurrent_adjoint(rnn, x, grad_output=weight, grad_hn=last)
    with TimestepProbe(rnn) as probe:
        loss().backward()
        readings = probe.measure()
    ways = ("", "_reverse") if rnn.bidirectional else ("",)
    parts = [f"l{layer}{way}" for layer in range(rnn.num_layers) for way in ways]
    assert [reading.part for reading in readings] == parts
    for k, reading in enumerate(readings):
        assert reading.source == "exact"
        assert reading.profile == pytest.approx(
            root_mean_square(adjoint.hidden[k].norm(dim=-1)), rel=1e-4
        )
        followed = adjoint.followed[k]
        if reading.part.endswith("reverse"):
            followed = followed.flip(0)
        expected = transport_decay(followed[1:], followed[:-1], 1e-30)
        # All units of a layer with ReLU may be dead.
        assert reading.decay_rate == pytest.approx(expected.rate.item(), rel=1e-4, nan_ok=True)
        assert bool(reading.note) == math.isnan(reading.decay_rate)
        assert dict(reading.causes) == pytest.approx(
            {name: value.item() for name, value in adjoint.causes[k].items()}, rel=1e-4
        )
        tenth = adjoint.input_norms[k].square()
        share = (tenth[0] if reading.part.endswith("reverse") else tenth[-1]).sum() / tenth.sum()
        assert reading.recency == pytest.approx(share.item(), rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("in_order", [False, True])
def test_packed_sequences(kind: str, exact: bool, in_order: bool) -> None:
    rnn = KINDS[kind](I, H, bidirectional=True)
    lengths = [7, 5, 5, 2] if in_order else [5, 2, 7, 5]
    x = torch.randn(7, 4, I)

    def packed(value: Tensor) -> PackedSequence:
        return pack_padded_sequence(value, torch.tensor(lengths), enforce_sorted=in_order)

    def loss(result: Any) -> Tensor:
        states = result[1][0] if isinstance(result[1], tuple) else result[1]
        return result[0].data.pow(2).sum() + states.sum()

    leaf = x.clone().requires_grad_()
    loss(copy.deepcopy(rnn)(packed(leaf))).backward()
    alive = torch.tensor([[t < n for n in lengths] for t in range(7)])
    squares = leaf.grad.double().square().sum(-1)
    expected = (squares.sum(1) / alive.sum(1)).sqrt()
    with TimestepProbe(rnn) as probe:
        probe.exact = exact
        result = rnn(packed(x))
        assert isinstance(result[0], PackedSequence)
        loss(result).backward()
        readings = probe.measure()
    if not exact:
        (reading,) = readings
        assert reading.profile == pytest.approx(expected.tolist(), rel=1e-5)
        output, _ = rnn(packed(x))
        direct = pad_packed_sequence(output)[0].detach().mul(2).square().sum(-1)
        count = H  # of ones in the gradient of each last state
        ends = torch.tensor([[t == n - 1 for n in lengths] for t in range(7)]) * count
        ends[0] += count
        entered = (direct + ends).sum(1)
        assert reading.entry == pytest.approx((entered / entered.sum()).tolist(), rel=1e-5)
        return
    assert [reading.part for reading in readings] == ["l0", "l0_reverse"]
    assert all(math.isfinite(reading.decay_rate) and not reading.note for reading in readings)
    assert readings[0].sequences == 4


def test_many_packed_sequences_are_measured_by_some_of_them() -> None:
    rnn = nn.LSTM(I, H)
    lengths = torch.randint(2, 12, (70,))
    x = torch.randn(int(lengths.max()), 70, I)
    hx = (torch.randn(1, 70, H), torch.randn(1, 70, H))

    def loss() -> Tensor:
        output, (hidden, cell) = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        return output.data.pow(2).sum() + hidden.sum() + cell.pow(2).sum()

    with TimestepProbe(rnn) as probe:
        loss().backward()
        (reading,) = probe.measure()
    assert reading.note == ""  # the replay of the chosen rows was checked against the output
    order = pack_padded_sequence(x, lengths, enforce_sorted=False).sorted_indices
    some = order[::5]
    packed = pack_padded_sequence(x[:, some], lengths[some])
    states = (hx[0][:, some], hx[1][:, some])
    output, (_, cell) = rnn(packed, states)
    adjoint = recurrent_adjoint(
        rnn,
        packed,
        states,
        grad_output=output._replace(data=2 * output.data),
        grad_hn=torch.ones(1, len(some), H),
        grad_cn=2 * cell,
    )
    expected = transport_decay(adjoint.followed[0, 1:], adjoint.followed[0, :-1], 1e-30)
    assert reading.sequences == len(some) == 14
    assert reading.decay_rate == pytest.approx(expected.rate.item(), rel=1e-5)


def test_ends_of_padded_sequences_are_where_the_loss_enters() -> None:
    rnn = nn.GRU(I, H, batch_first=True)
    lengths = torch.tensor([20, 11, 5])
    x = torch.randn(3, 20, I)

    def last(output: Tensor) -> Tensor:
        return output[torch.arange(3), lengths - 1].pow(2).sum()

    (reading,) = cheap(rnn, lambda: last(rnn(x)[0]))
    gradient = input_gradient(rnn, x, lambda result: last(result[0])).norm(dim=-1).T
    alive = torch.tensor([[t < n for n in lengths] for t in range(20)])
    expected = (gradient.square().sum(1) / alive.sum(1)).sqrt()
    assert reading.profile == pytest.approx(expected.tolist(), rel=1e-4)
    assert sum(reading.entry) == pytest.approx(1.0)
    assert [t for t, share in enumerate(reading.entry) if share] == [4, 10, 19]
    assert reading.decay_rate < 0
    tenth = sum(gradient[n - -(-n // 10) : n, b].square().sum() for b, n in enumerate([20, 11, 5]))
    assert reading.recency == pytest.approx((tenth / gradient.square().sum()).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_cheap_rate_is_near_the_exact_one(kind: str) -> None:
    rnn = KINDS[kind](8, 32)
    x = torch.randn(80, 32, 8)
    (near,) = cheap(rnn, lambda: rnn(x)[0][-1].pow(2).sum())
    with TimestepProbe(rnn) as probe:
        rnn(x)[0][-1].pow(2).sum().backward()
        (exact,) = probe.measure()
    assert exact.decay_rate < 0
    assert near.decay_rate == pytest.approx(exact.decay_rate, rel=0.05)
    assert near.decay_error > 0


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(I, I)

    def forward(self, x: Tensor) -> Tensor:
        return 100.0 * x + self.rnn(x)[0]


def test_only_the_modules_own_share_counts() -> None:
    model = Residual()
    x = torch.randn(T, B, I, requires_grad=True)
    (reading,) = cheap(model, lambda: model(x).pow(2).sum())
    weight = 2 * model(x).detach()
    alone = input_gradient(model.rnn, x, lambda result: (result[0] * weight).sum())
    assert reading.profile == pytest.approx(root_mean_square(alone.norm(dim=-1)), rel=1e-4)
    both = input_gradient(model, x, lambda output: output.pow(2).sum())
    x.grad = None
    with TimestepProbe(model):
        model(x).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, both)
