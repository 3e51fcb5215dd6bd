"""What goes in comes out a fixed number of steps later, in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.measure.readback import DelayedRead

STEPS = st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=3), max_size=30)


@given(delay=st.integers(0, 5), steps=STEPS)
def test_order_and_delay(delay: int, steps: list[list[float]]) -> None:
    queue: DelayedRead[int] = DelayedRead(delay)
    for number, values in enumerate(steps):
        due = queue.push(number, torch.tensor(values))
        expected = [(number - delay, steps[number - delay])] if number >= delay else []
        assert due == expected
    assert queue.drain() == list(enumerate(steps))[max(0, len(steps) - delay) :]


@given(delay=st.integers(0, 5), steps=STEPS, at=st.integers(0, 30))
def test_refilled_it_continues(delay: int, steps: list[list[float]], at: int) -> None:
    whole: DelayedRead[int] = DelayedRead(delay)
    part: DelayedRead[int] = DelayedRead(delay)
    for number, values in enumerate(steps):
        if number == at:
            part, entries = DelayedRead(delay), part.drain()
            part.refill(entries)
            assert part.drain() == entries
        vector = torch.tensor(values)
        assert part.push(number, vector) == whole.push(number, vector)


def test_draining_takes_nothing_out() -> None:
    queue: DelayedRead[str] = DelayedRead(2)
    queue.push("a", torch.tensor([1.0]))
    assert queue.drain() == queue.drain() == [("a", [1.0])]
    queue.refill([])
    assert queue.drain() == []


@pytest.mark.parametrize("delay", [1, 2])
def test_a_vector_may_be_overwritten_after_it_went_in(delay: int) -> None:
    queue: DelayedRead[int] = DelayedRead(delay)
    vector = torch.zeros(2)
    seen = []
    for number in range(5):
        vector.fill_(number)
        seen += queue.push(number, vector)
    assert seen == [(n, [float(n)] * 2) for n in range(5 - delay)]


def test_values_that_are_not_finite_and_doubles_come_out_as_they_are() -> None:
    queue: DelayedRead[None] = DelayedRead(0)
    ((_, values),) = queue.push(
        None, torch.tensor([torch.nan, torch.inf, 0.1], dtype=torch.float64)
    )
    assert values[0] != values[0]
    assert values[1:] == [torch.inf, 0.1]


def test_it_keeps_no_graph() -> None:
    queue: DelayedRead[None] = DelayedRead(1)
    queue.push(None, torch.ones(2, requires_grad=True) * 2)
    assert queue.drain() == [(None, [2.0, 2.0])]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_on_a_gpu_it_never_waits_for_the_device() -> None:
    """A read that waits raises in this mode; the copy itself must not."""
    queue: DelayedRead[int] = DelayedRead(2)
    vectors = [torch.full((3,), float(n), device="cuda") for n in range(6)]
    seen = [queue.push(n, vectors[n]) for n in range(2)]
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        seen += [queue.push(n, vectors[n]) for n in range(2, 6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [[], [], *([(n, [float(n)] * 3)] for n in range(4))]
