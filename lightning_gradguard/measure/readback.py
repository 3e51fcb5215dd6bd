"""Read device values on the host a fixed number of steps later, without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lightning_gradguard._validation import check_number

Tag = TypeVar("Tag")


class PendingRead:
    """A vector on its way from the device to the host.

    Args:
        values: The vector.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._host = values.detach().to("cpu", copy=True)
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[float]:
        """The values, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._host.tolist()
        return values


class DelayedRead(Generic[Tag]):
    """A queue in which a vector put in at one step comes out ``delay`` steps later as numbers.

    The delay is a fixed number of steps, not "when it has arrived": every rank then acts on the
    same values at the same step, and so does a resumed run.

    Args:
        delay: Steps between :meth:`push` and the value's return.

    Raises:
        ValueError: If ``delay`` is negative.

    Example:
        >>> import torch
        >>> queue = DelayedRead(delay=1)
        >>> queue.push("first", torch.tensor([1.0]))
        []
        >>> queue.push("second", torch.tensor([2.0]))
        [('first', [1.0])]
    """

    def __init__(self, delay: int) -> None:
        check_number("delay", delay, at_least=0, integer=True)
        self.delay = delay
        self._queue: deque[tuple[Tag, PendingRead]] = deque()

    def push(self, tag: Tag, values: Tensor) -> list[tuple[Tag, list[float]]]:
        """Put in this step's vector; returns the entries that are due, oldest first."""
        self._queue.append((tag, PendingRead(values)))
        due = []
        while len(self._queue) > self.delay:
            oldest, pending = self._queue.popleft()
            due.append((oldest, pending.wait()))
        return due

    def drain(self) -> list[tuple[Tag, list[float]]]:
        """Wait for everything that is under way, without taking it out of the queue."""
        return [(tag, pending.wait()) for tag, pending in self._queue]

    def refill(self, entries: list[tuple[Tag, list[float]]]) -> None:
        """Start again from what :meth:`drain` returned."""
        self._queue = deque(
            (tag, PendingRead(torch.tensor(values, dtype=torch.float64))) for tag, values in entries
        )
