"""Which calls of a cell follow each other, and what is said where that is not all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.measure.timesteps import TimestepProbe
from tests.measure.cell_loops import LOSSES, B, H, I, Loop, T, pair, rate_of, readings

BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "residual": lambda new, old: old + 0.1 * new,
    "mask": lambda new, old: torch.where(torch.arange(B).unsqueeze(-1) % 2 == 0, new, old),
    "layer norm": lambda new, old: nn.functional.layer_norm(new, (H,)),
    "dropout": lambda new, old: nn.functional.dropout(new, 0.5),
    "in place": lambda new, old: new.mul_(0.9),
    "recombined": lambda new, old: new.roll(1, -1),
}


def test_chains_begin_where_no_state_is_passed_on() -> None:
    loop = Loop(nn.GRUCell(I, H))
    x = torch.randn(T, B, I)

    def loss() -> Tensor:
        first = loop(x)[-1].sum()
        second = loop(x[:7], torch.randn(B, H))[-1].sum()
        learned = nn.Parameter(torch.zeros(B, H))
        return first + second + loop(x[:5], learned)[-1].sum()

    (reading,) = readings(loop, loss)
    assert (reading.timesteps, reading.sequences) == (T, 3 * B)
    assert reading.decay_rate < 0


def test_two_layers_are_two_chains() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.RNNCell(I, H), nn.RNNCell(H, H)

        def forward(self, x: Tensor) -> Tensor:
            one = two = None
            for x_t in x:
                one = self.first(x_t, one)
                two = self.second(one, two)
            return two

    model = Stacked()
    x = torch.randn(T, B, I)
    first, second = readings(model, lambda: model(x).sum())
    assert (first.name, second.name) == ("first", "second")
    assert first.timesteps == second.timesteps == T


def test_one_call_is_no_chain() -> None:
    loop = Loop(nn.LSTMCell(I, H))
    (reading,) = readings(loop, lambda: loop(torch.randn(1, B, I)).sum())
    assert math.isnan(reading.decay_rate)
    assert "no call of it was given the state" in reading.note


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("start", ["zeros", "learned"])
def test_a_loop_that_changes_the_state_has_no_rate(between: str, start: str) -> None:
    cell = nn.GRUCell(I, H)
    learned = nn.Parameter(torch.zeros(H))

    def loss() -> Tensor:
        state = torch.zeros(B, H) if start == "zeros" else learned.expand(B, -1)
        for x_t in torch.randn(T, B, I):
            state = BETWEEN[between](cell(x_t, state), state)
        return state.square()

    (reading,) = readings(nn.ModuleList([cell]), loss)
    assert reading.note == "not measured exactly: the loop changes the state between its calls"
    assert math.isnan(reading.decay_rate)
    assert reading.timesteps == len(reading.profile) == T


def test_only_one_of_two_states_changed() -> None:
    cell = nn.LSTMCell(I, H)

    def loss() -> Tensor:
        h, c = torch.zeros(B, H), torch.zeros(B, H)
        for x_t in torch.randn(T, B, I):
            h, c = cell(x_t, (h, c.clamp(-1, 1)))
        return h

    (reading,) = readings(nn.ModuleList([cell]), loss)
    assert "the loop changes the state" in reading.note


@pytest.mark.parametrize("depth", [0, 30])
def test_an_input_made_of_the_state_has_no_rate(depth: int) -> None:
    cell = nn.GRUCell(H, H)

    def loss() -> Tensor:
        state, x_t = torch.randn(B, H), torch.zeros(B, H)
        for _ in range(T):
            state = cell(x_t, state)
            x_t = 2 * state
            for _ in range(depth):
                x_t = x_t.sin()
        return state.square()

    (reading,) = readings(nn.ModuleList([cell]), loss)
    assert "its input depends on its own state" in reading.note
    assert math.isnan(reading.decay_rate)
    assert reading.timesteps == T


@pytest.mark.parametrize("wrap", [lambda h: h, torch.clone, lambda h: h.view(B, 2, -1).view(B, H)])
@pytest.mark.parametrize("start", ["zeros", "learned", "encoder"])
def test_sequences_in_lockstep_and_any_initial_state(
    start: str, wrap: Callable[[Tensor], Tensor]
) -> None:
    cell, encoder = nn.GRUCell(I, H), nn.Linear(I, H)
    learned = nn.Parameter(torch.zeros(H))
    kept: list[Tensor] = []

    def loss() -> Tensor:
        first = {
            "zeros": torch.zeros(B, H),
            "learned": learned.expand(B, -1),
            "encoder": encoder(torch.randn(B, I)),
        }[start]
        one = two = first
        for x_t in torch.randn(T, B, I):
            one, two = cell(x_t, wrap(one)), cell(-x_t, wrap(two))
            one.retain_grad()
            kept.append(one)
        return one.square().sum() + two.square().sum()

    (reading,) = readings(nn.ModuleList([cell]), loss)
    assert reading.note == ""
    assert (reading.timesteps, reading.sequences) == (T, 2 * B)
    assert reading.decay_rate == pytest.approx(rate_of(kept), rel=0.1)


def test_accumulated_gradients_from_a_learned_initial_state() -> None:
    loop = Loop(nn.GRUCell(I, H))
    learned = nn.Parameter(torch.zeros(H))
    with TimestepProbe(loop) as probe:
        for _ in range(3):
            loop(torch.randn(T, B, I), learned.expand(B, -1))[-1].sum().backward()
        (reading,) = probe.measure()
    assert (reading.timesteps, reading.sequences, reading.note) == (T, 3 * B, "")


def test_a_batch_that_shrinks_as_sequences_end() -> None:
    loop, fused = pair(nn.LSTMCell)
    x = torch.randn(T, 40, I)
    lengths = torch.arange(40).flip(0) % T + 1
    lengths, _ = lengths.sort(descending=True)

    def ours() -> Tensor:
        state, ends = None, []
        for t, x_t in enumerate(x):
            alive = int((lengths > t).sum())
            if state is not None:
                ends.append(state[0][alive:])
                state = (state[0][:alive], state[1][:alive])
            state = loop.cell(x_t[:alive], state)
        return torch.cat([*ends, state[0]]).square()

    (ours_,) = readings(loop, ours)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
    (theirs,) = readings(fused, lambda: LOSSES["last"](fused(packed)[1][0]))
    assert ours_.note == theirs.note == ""
    assert ours_.timesteps == T
    # Of the longer batch not the same sequences are kept.
    assert ours_.decay_rate == pytest.approx(theirs.decay_rate, rel=0.1)


def test_a_loop_too_long_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gradguard.measure._cells._MOST_CALLS", 15)
    loop = Loop(nn.LSTMCell(I, H))
    x = torch.randn(T, B, I)
    states: list[tuple[Tensor, Tensor]] = []

    def loss() -> Tensor:
        state = None
        for x_t in x:
            state = loop.cell(x_t, state)
            states.append(state)
            state[0].retain_grad()
            state[1].retain_grad()
        return state[0].square().sum()

    (reading,) = readings(loop, loss)
    assert reading.note == f"only the first 15 of {T} timesteps were kept for the rate"
    assert (reading.timesteps, len(reading.profile)) == (T, T)
    assert reading.steps == 14
    # The adjoint of (h, c), without what reaches c through h: o * (1 - tanh(c)^2), o = h / tanh(c).
    norms = []
    for h, c in states:
        tanh = c.tanh()
        from_future = c.grad - h.grad * h / tanh * (1 - tanh**2)
        norms.append(torch.cat([h.grad, from_future], -1).double().norm().item())
    assert reading.decay_rate == pytest.approx(math.log(norms[0] / norms[14]) / 14, rel=1e-3)
    monkeypatch.undo()
    (whole,) = readings(loop, loss)
    assert whole.note == ""
    assert (reading.recency, reading.profile) == (whole.recency, whole.profile)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_too_long_and_unbatched(cell: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gradguard.measure._cells._MOST_CALLS", 15)
    loop = Loop(cell(I, H))
    x = torch.randn(T, I)
    (unbatched,) = readings(loop, lambda: loop(x)[-1])
    (batched,) = readings(loop, lambda: loop(x.unsqueeze(1))[-1])
    assert unbatched.decay_rate == pytest.approx(batched.decay_rate, rel=1e-4)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_long_chains_go_back_in_chunks(
    cell: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(cell(I, H))
    x = torch.randn(T, B, I)
    (whole,) = readings(loop, lambda: loop(x)[-1])
    monkeypatch.setattr("lightning_gradguard.measure._cell_readings._CHUNK_ELEMENTS", 7 * B * H)
    (chunked,) = readings(loop, lambda: loop(x)[-1])
    assert chunked.note == ""
    assert chunked.decay_rate == pytest.approx(whole.decay_rate, rel=1e-5)
