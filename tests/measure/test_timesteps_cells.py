"""Readings of cells in a loop, against the fused module with the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.measure.timesteps import TimestepProbe
from lightning_gradguard.readings import TimeReading

T, B, I, H = 25, 8, 3, 6  # noqa: E741 - input


class Loop(nn.Module):
    def __init__(self, cell: nn.Module, *, keyword: bool = False) -> None:
        super().__init__()
        self.cell = cell
        self.keyword = keyword

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        outputs = []
        for x_t in x:
            state = self.cell(input=x_t, hx=state) if self.keyword else self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


FUSED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.RNNCell: nn.RNN,
    nn.LSTMCell: nn.LSTM,
    nn.GRUCell: nn.GRU,
}


def pair(cell: type[nn.Module], **options: Any) -> tuple[Loop, nn.Module]:
    """A loop of cells and the fused module with the same weights."""
    loop, fused = Loop(cell(I, H, **options)), FUSED[cell](I, H, **options)
    fused.load_state_dict({f"{name}_l0": value for name, value in loop.cell.state_dict().items()})
    return loop, fused


def readings(model: nn.Module, loss: Callable[[], Tensor]) -> list[TimeReading]:
    with TimestepProbe(model) as probe:
        loss().sum().backward()
        return probe.measure()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda output: output[-1].pow(2).sum(),
    "every": lambda output: output.pow(2).sum(),
    "ragged": lambda output: output[torch.arange(B) + T - B, torch.arange(B)].sum(),
}


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


def test_more_sequences_than_are_kept() -> None:
    loop, fused = pair(nn.LSTMCell)
    x = torch.randn(T, 80, I)
    (ours,) = readings(loop, lambda: loop(x)[-1].pow(2).sum())
    (theirs,) = readings(fused, lambda: fused(x)[0][-1].pow(2).sum())
    assert ours.sequences == theirs.sequences == 16
    assert ours.decay_rate == pytest.approx(theirs.decay_rate, rel=1e-4)


def test_one_call_is_no_chain() -> None:
    loop = Loop(nn.LSTMCell(I, H))
    (reading,) = readings(loop, lambda: loop(torch.randn(1, B, I)).sum())
    assert math.isnan(reading.decay_rate)
    assert "no call of it was given the state" in reading.note


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
