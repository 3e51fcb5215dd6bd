"""Readings of cells in a loop, against the fused module with the same weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_gradguard.measure.timesteps import TimestepProbe
from tests.measure.cell_loops import LOSSES, B, H, I, Loop, T, pair, readings


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (nn.RNNCell, {}),
        (nn.RNNCell, {"nonlinearity": "relu"}),
        (nn.LSTMCell, {}),
        (nn.LSTMCell, {"bias": False}),
        (nn.GRUCell, {}),
    ],
)
def test_a_loop_of_cells_reads_like_the_fused_module(
    cell: type[nn.Module], options: dict[str, Any], loss: str
) -> None:
    loop, fused = pair(cell, **options)
    x = torch.randn(T, B, I)
    (ours,) = readings(loop, lambda: LOSSES[loss](loop(x)))
    (theirs,) = readings(fused, lambda: LOSSES[loss](fused(x)[0]))
    assert ours.note == theirs.note == ""
    assert (ours.name, ours.part, ours.source) == ("cell", "", "exact")
    assert (ours.kind, ours.timesteps, ours.sequences) == (theirs.kind, T, B)
    assert ours.decay_rate == pytest.approx(theirs.decay_rate, rel=1e-3)
    assert ours.decay_error == pytest.approx(theirs.decay_error, rel=1e-2)
    assert ours.recency == pytest.approx(theirs.recency, rel=1e-3)
    # The first call has no state to read the cause from.
    assert dict(ours.causes) == pytest.approx(dict(theirs.causes), rel=0.1)


def test_profile_is_the_gradient_of_each_state() -> None:
    loop = Loop(nn.GRUCell(I, H))
    x = torch.randn(T, B, I)
    states = []
    state = None
    for x_t in x:
        state = loop.cell(x_t, state)
        state.retain_grad()
        states.append(state)
    state.pow(2).sum().backward()
    expected = [state.grad.double().norm(dim=-1).square().mean().sqrt() for state in states]
    (reading,) = readings(loop, lambda: loop(x)[-1].pow(2).sum())
    assert reading.profile == pytest.approx([value.item() for value in expected], rel=1e-4)


@pytest.mark.parametrize("keyword", [False, True])
def test_unbatched_and_by_keyword(keyword: bool) -> None:
    loop = Loop(nn.LSTMCell(I, H), keyword=keyword)
    x = torch.randn(T, I)
    (unbatched,) = readings(loop, lambda: loop(x)[-1])
    (batched,) = readings(loop, lambda: loop(x.unsqueeze(1))[-1])
    assert unbatched.sequences == 1
    assert unbatched.decay_rate == pytest.approx(batched.decay_rate, rel=1e-5)


def test_more_sequences_than_are_kept() -> None:
    loop, fused = pair(nn.LSTMCell)
    x = torch.randn(T, 80, I)
    (ours,) = readings(loop, lambda: loop(x)[-1].pow(2).sum())
    (theirs,) = readings(fused, lambda: fused(x)[0][-1].pow(2).sum())
    assert ours.sequences == theirs.sequences == 16
    assert ours.decay_rate == pytest.approx(theirs.decay_rate, rel=1e-4)


def test_only_exact_steps_measure_cells() -> None:
    loop = Loop(nn.LSTMCell(I, H))
    with TimestepProbe(loop) as probe:
        probe.exact = False
        loop(torch.randn(T, B, I)).sum().backward()
        assert probe.measure() == []


def test_weights_that_changed_and_gradients_that_are_not_finite() -> None:
    loop = Loop(nn.LSTMCell(I, H))
    optimizer = torch.optim.SGD(loop.parameters(), lr=0.1)
    with TimestepProbe(loop) as probe:
        loop(torch.randn(T, B, I)).sum().backward()
        optimizer.step()
        (reading,) = probe.measure()
        assert "weights changed" in reading.note
        assert math.isnan(reading.decay_rate)
        x = torch.randn(T, B, I)
        x[3, 2] = math.nan
        loop(x).sum().backward()
        (reading,) = probe.measure()
        assert reading.note == "the gradient is not finite"
        assert math.isnan(reading.decay_rate)


def test_bfloat16_autocast() -> None:
    loop = Loop(nn.LSTMCell(I, H))
    x = torch.randn(T, B, I)
    (exact,) = readings(loop, lambda: loop(x)[-1])
    with torch.autocast("cpu", torch.bfloat16):
        (reading,) = readings(loop, lambda: loop(x)[-1])
    assert reading.decay_rate == pytest.approx(exact.decay_rate, rel=0.05)


class Renamed(nn.GRUCell):
    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return super().forward(x, h)


class Masked(nn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor | None, mask: Any = None) -> Tensor:  # noqa: A002
        return super().forward(input, hx)


class Zoneout(nn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002
        new = super().forward(input, hx)
        return new if hx is None else torch.where(torch.rand_like(new) < 0.1, hx, new)


def test_positional_arguments_stay_positional() -> None:
    loop = Loop(nn.LSTMCell(I, H))
    shapes = []
    loop.cell.register_forward_hook(lambda _cell, given, _output: shapes.append(given[0].shape))
    (reading,) = readings(loop, lambda: loop(torch.randn(T, B, I))[-1])
    assert shapes == [(B, I)] * T
    assert reading.note == ""


@pytest.mark.parametrize("kind", [Renamed, Zoneout, Masked])
def test_subclasses_are_called_as_the_loop_calls_them(kind: type[nn.GRUCell]) -> None:
    cell = kind(I, H)
    more = (torch.ones(B, H),) if kind is Masked else ()

    def loss() -> Tensor:
        state = torch.zeros(B, H)
        for x_t in torch.randn(T, B, I):
            state = cell(x_t, state, *more)
        return state

    (reading,) = readings(nn.ModuleList([cell]), loss)
    assert reading.note == "not measured exactly: its forward is not torch's own"
    assert reading.timesteps == len(reading.profile) == T
    assert math.isnan(reading.decay_rate)


def weight_norm_of_old(cell: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(cell, "weight_hh")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Zoneout, "its forward is not torch's own"),
        (
            lambda *sizes: parametrizations.spectral_norm(nn.GRUCell(*sizes), "weight_hh"),
            "its weights are parametrized",
        ),
        (lambda *sizes: weight_norm_of_old(nn.GRUCell(*sizes)), "its weights are parametrized"),
    ],
)
def test_a_cell_whose_replay_could_leave_traces_is_not_replayed(
    make: Callable[..., nn.Module], why: str
) -> None:
    loop = Loop(make(I, H))
    x = torch.randn(T, B, I)
    with TimestepProbe(loop) as probe:
        loop(x)[-1].sum().backward()
        random = torch.get_rng_state()
        buffers = {name: buffer.clone() for name, buffer in loop.named_buffers()}
        (reading,) = probe.measure()
    assert reading.note == f"not measured exactly: {why}"
    assert math.isnan(reading.decay_rate)
    assert reading.recency > 0
    assert torch.equal(random, torch.get_rng_state())
    for name, buffer in loop.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_the_loss_may_enter_through_the_cell_state() -> None:
    loop, fused = pair(nn.LSTMCell)
    x = torch.randn(T, B, I)

    def ours() -> Tensor:
        state = None
        for x_t in x:
            state = loop.cell(x_t, state)
        return state[1].square() + state[0]

    def theirs() -> Tensor:
        h, c = fused(x)[1]
        return c.square() + h

    (one,), (other,) = readings(loop, ours), readings(fused, theirs)
    assert one.note == other.note == ""
    assert one.decay_rate == pytest.approx(other.decay_rate, rel=1e-3)


def test_weights_changed_behind_the_version_counter() -> None:
    loop = Loop(nn.LSTMCell(I, H))
    with TimestepProbe(loop) as probe:
        loop(torch.randn(T, B, I))[-1].sum().backward()
        loop.cell.weight_hh.data.mul_(1.5)
        (reading,) = probe.measure()
    assert "returned something else" in reading.note
    assert math.isnan(reading.decay_rate)
