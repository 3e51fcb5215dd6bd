"""Several calls of a module in a step, and what is said where a rate is not known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.measure.timesteps import TimestepProbe
from lightning_gradguard.readings import TimeReading
from tests.measure.time_readings import B, H, I, T, cheap, input_gradient, root_mean_square


def test_several_calls_of_a_module() -> None:
    rnn = nn.LSTM(I, H)
    long, short = torch.randn(T, B, I), torch.randn(5, 2, I)
    (reading,) = cheap(rnn, lambda: rnn(long)[0].pow(2).sum() + rnn(short)[0].pow(2).sum())
    squares = torch.zeros(T, B + 2)
    squares[:, :B] = input_gradient(rnn, long, lambda r: r[0].pow(2).sum()).norm(dim=-1)
    squares[:5, B:] = input_gradient(rnn, short, lambda r: r[0].pow(2).sum()).norm(dim=-1)
    alive = torch.tensor([B + 2] * 5 + [B] * (T - 5))
    expected = (squares.square().sum(1) / alive).sqrt()
    assert reading.profile == pytest.approx(expected.tolist(), rel=1e-4)
    assert (reading.timesteps, reading.sequences) == (T, B + 2)


def test_accumulated_gradients_are_calls_of_one_measurement() -> None:
    rnn = nn.GRU(I, H)
    batches = torch.randn(2, T, B, I)
    with TimestepProbe(rnn) as probe:
        for batch in batches:
            rnn(batch)[0][-1].sum().backward()
        (reading,) = probe.measure()
        assert probe.measure() == []
    with TimestepProbe(rnn) as probe:
        rnn(torch.cat(list(batches), dim=1))[0][-1].sum().backward()
        (at_once,) = probe.measure()
    assert reading.sequences == at_once.sequences == 2 * B
    assert reading.decay_rate == pytest.approx(at_once.decay_rate, rel=1e-5)
    assert reading.profile == pytest.approx(at_once.profile, rel=1e-5)


def test_two_backwards_through_one_graph_add_up() -> None:
    rnn = nn.LSTM(I, H)
    x = torch.randn(T, B, I)
    with TimestepProbe(rnn) as probe:
        output, _ = rnn(x)
        output[-1].sum().backward(retain_graph=True)
        output[-1].pow(2).sum().backward()
        (twice,) = probe.measure()
        output, _ = rnn(x)
        (output[-1].sum() + output[-1].pow(2).sum()).backward()
        (once,) = probe.measure()
    assert twice.decay_rate == pytest.approx(once.decay_rate, rel=1e-5)
    assert twice.profile == pytest.approx(once.profile, rel=1e-5)


def test_a_call_beyond_the_eighth_is_left_out() -> None:
    rnn = nn.RNN(I, H)
    x = torch.randn(12, 3, 1, I)
    with TimestepProbe(rnn) as probe:
        sum(rnn(sequence)[0].sum() for sequence in x).backward()
        (reading,) = probe.measure()
        assert reading.sequences == 8
        for sequence in x:  # graphs that are gone leave their place to others
            rnn(sequence)
        rnn(x[0])[0].sum().backward()
        (reading,) = probe.measure()
        assert reading.sequences == 1


@pytest.mark.parametrize("detached", [False, True])
def test_truncated_backpropagation(detached: bool) -> None:
    rnn = nn.LSTM(I, H)
    chunks = torch.randn(2, T, B, I)

    def loss(first: Tensor, second: Tensor, module: nn.Module) -> Tensor:
        _, state = module(first)
        if detached:
            state = (state[0].detach(), state[1].detach())
        return module(second, state)[0][-1].pow(2).sum()

    with TimestepProbe(rnn) as probe:
        loss(*chunks, rnn).backward()
        (reading,) = probe.measure()
    leaves = [chunk.clone().requires_grad_() for chunk in chunks]
    loss(*leaves, copy.deepcopy(rnn)).backward()
    assert reading.sequences == (B if detached else 2 * B)
    assert (leaves[0].grad is None) == detached
    if not detached:  # what the second chunk sends back enters the first one at its end
        shares = [t for t, share in enumerate(reading.entry) if share > 1e-12]
        assert shares == [T - 1]


def test_bfloat16_autocast() -> None:
    rnn, head = nn.LSTM(I, 16), nn.Linear(16, 2)
    model = nn.ModuleDict({"rnn": rnn, "head": head})
    x = torch.randn(20, 8, I)
    rates = []
    for enabled in (False, True):
        with TimestepProbe(model) as probe:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = head(rnn(x)[0][-1]).pow(2).sum()
            loss.backward()
            (reading,) = probe.measure()
            assert reading.note == ""
            rates.append(reading.decay_rate)
    assert rates[1] == pytest.approx(rates[0], rel=0.05)


def test_weights_that_changed_are_noted() -> None:
    rnn = nn.LSTM(I, H)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    with TimestepProbe(rnn) as probe:
        rnn(torch.randn(T, B, I))[0][-1].sum().backward()
        optimizer.step()
        (reading,) = probe.measure()
    assert "weights changed" in reading.note
    assert reading.source == "input"
    assert reading.decay_rate < 0


def test_in_place_changes_of_the_output_and_the_input() -> None:
    rnn = nn.RNN(I, H)
    x = torch.randn(T, B, I)
    weight = torch.randn(T, B, H)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        output = module(x)[0]
        if type(output.grad_fn).__name__ != "StackBackward0":
            output = output * 1.0  # a kernel that needs its output again forbids what follows
        return (output.relu_() * weight).sum()

    expected = input_gradient(rnn, x, lambda r: (r[0].relu() * weight).sum())
    with TimestepProbe(rnn) as probe:
        loss(rnn, x).backward()
        (reading,) = probe.measure()
        assert reading.note == ""
        probe.exact = False
        loss(rnn, x).backward()
        (reading,) = probe.measure()
    assert reading.profile == pytest.approx(root_mean_square(expected.norm(dim=-1)), rel=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_one_timestep(exact: bool) -> None:
    rnn = nn.LSTM(I, H)
    with TimestepProbe(rnn) as probe:
        probe.exact = exact
        rnn(torch.randn(1, B, I))[0].sum().backward()
        (reading,) = probe.measure()
    assert math.isnan(reading.decay_rate)
    assert "one timestep" in reading.note


@pytest.mark.parametrize("exact", [False, True])
def test_a_sequence_that_is_not_finite(exact: bool) -> None:
    rnn = nn.LSTM(I, H)
    x = torch.randn(T, B, I)
    x[4, 1] = math.nan
    with TimestepProbe(rnn) as probe:
        probe.exact = exact
        rnn(x)[0][-1].sum().backward()
        readings = probe.measure()
    for reading in readings:
        assert math.isnan(reading.decay_rate)
        assert reading.note == "the gradient is not finite"


def test_no_gradient_at_all() -> None:
    rnn = nn.LSTM(I, H)
    with TimestepProbe(rnn) as probe:
        (rnn(torch.randn(T, B, I))[0] * 0.0).sum().backward()
        (reading,) = probe.measure()
    assert reading.note == "no gradient arrived"
    assert math.isnan(reading.decay_rate)


def test_gradients_of_the_weights_only() -> None:
    """``torch.autograd.grad`` does not compute the gradient of the input then."""
    rnn = nn.LSTM(I, H)
    with TimestepProbe(rnn) as probe:
        for probe.exact in (False, True):
            torch.autograd.grad(rnn(torch.randn(T, B, I))[0][-1].sum(), list(rnn.parameters()))
            (reading,) = probe.measure()
            if probe.exact:
                assert reading.decay_rate < 0
            else:
                assert "did not compute the gradient of its input" in reading.note


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("exact", [False, True])
def test_a_long_sequence_in_bounded_memory(exact: bool, batch: int) -> None:
    steps = 100_000 if batch == 1 else 30_000
    rnn = nn.RNN(1, 4)
    with TimestepProbe(rnn) as probe:
        probe.exact = exact
        rnn(torch.randn(steps, batch, 1))[0][-1].sum().backward()
        (call,) = probe._watches[0].calls
        assert call.input_norms.numel() <= 2**20
        assert call.input_norms.untyped_storage().nbytes() <= 2**23
        if exact:
            assert call.capture.input.numel() * 4 <= 2**22
        (reading,) = probe.measure()
    assert reading.timesteps == steps
    assert len(reading.profile) == len(reading.entry) == 256
    assert reading.entry[-1] == pytest.approx(1.0)
    assert reading.decay_rate < 0


def test_snapshot_is_decoded_from_its_values() -> None:
    rnn = nn.LSTM(I, H, num_layers=2)
    with TimestepProbe(rnn) as probe:
        rnn(torch.randn(T, B, I))[0][-1].sum().backward()
        snapshot = probe.collect()
    assert snapshot.values.dtype == torch.float64
    readings = snapshot.decode(snapshot.values.tolist())
    assert [reading.part for reading in readings] == ["l0", "l1"]
    assert readings == [TimeReading.from_dict(reading.to_dict()) for reading in readings]
    with pytest.raises(ValueError, match="values must be the"):
        snapshot.decode([1.0])


def test_nothing_is_seen_while_not_watching() -> None:
    rnn = nn.LSTM(I, H)
    with TimestepProbe(rnn) as probe:
        probe.watching = False
        rnn(torch.randn(T, B, I))[0].sum().backward()
        assert probe.measure() == []
        probe.watching = True
        rnn(torch.randn(T, B, I))[0].sum().backward()
        assert len(probe.measure()) == 1


def test_discard_forgets() -> None:
    rnn = nn.LSTM(I, H)
    with TimestepProbe(rnn) as probe:
        loss = rnn(torch.randn(T, B, I))[0][-1].sum()
        loss.backward(retain_graph=True)
        probe.discard()
        assert probe.measure() == []
        loss.backward()  # of a step that is over
        assert probe.measure() == []
        loss = rnn(torch.randn(T, B, I))[0][-1].sum()
        probe.discard()
        loss.backward()
        assert probe.measure() == []


@pytest.mark.parametrize("batch", [6, 40])
def test_dropout_between_layers_is_replayed(batch: int) -> None:
    rnn = nn.LSTM(I, H, num_layers=3, dropout=0.5)
    x = torch.randn(T, batch, I)
    with TimestepProbe(rnn) as probe:
        rnn(x)[0].pow(2).sum().backward()
        readings = probe.measure()
        assert [reading.note for reading in readings] == ["", "", ""]
        assert readings[0].sequences == batch  # a mask is drawn for all of them
        rnn.eval()
        rnn(x)[0].pow(2).sum().backward()
        rnn.train()
        (reading,) = probe.measure()
    assert "eval mode" in reading.note
