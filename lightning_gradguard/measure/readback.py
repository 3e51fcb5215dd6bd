"""Read device values on the host a fixed number of steps later, without waiting for the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lightning_gradguard._validation import check_number

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class _Pending(Generic[Tag]):
    tag: Tag
    host: Tensor
    arrived: torch.cuda.Event | None


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
        self._queue: deque[_Pending[Tag]] = deque()

    def push(self, tag: Tag, values: Tensor) -> list[tuple[Tag, list[float]]]:
        """Put in this step's vector; returns the entries that are due, oldest first."""
        self._queue.append(self._send(tag, values))
        due = []
        while len(self._queue) > self.delay:
            due.append(self._receive(self._queue.popleft()))
        return due

    def drain(self) -> list[tuple[Tag, list[float]]]:
        """Wait for everything that is under way, without taking it out of the queue."""
        return [self._receive(pending) for pending in self._queue]

    def refill(self, entries: list[tuple[Tag, list[float]]]) -> None:
        """Start again from what :meth:`drain` returned."""
        self._queue = deque(
            _Pending(tag, torch.tensor(values, dtype=torch.float64), None)
            for tag, values in entries
        )

    @staticmethod
    def _send(tag: Tag, values: Tensor) -> _Pending[Tag]:
        if values.device.type != "cuda":
            return _Pending(tag, values.detach().to("cpu", copy=True), None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(values.device))
        return _Pending(tag, host, arrived)

    @staticmethod
    def _receive(pending: _Pending[Tag]) -> tuple[Tag, list[float]]:
        if pending.arrived is not None:
            pending.arrived.synchronize()
        return pending.tag, pending.host.tolist()
