"""Work shared out among processes, of which one that dies takes nothing but its own job along."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any, Generic, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Crash:
    """What became of a job that raised, or whose process died.

    Attributes:
        reason: The traceback, or how the process ended.
    """

    reason: str


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers that vanish cost some processors fifteen times the time; here they are zero."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # it is the processor's, and not only this run's


def in_processes(
    work: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[tuple[Job, Result | Crash]]:
    """Yields jobs with their results as they come in.

    Closing the iterator, also by an exception where it is used, ends the processes.

    Args:
        work: A function at the top level of a module, which new processes import.
        jobs: Its arguments, in the order in which they are begun.
        processes: How many at a time; 0 does the work here.
    """
    if not processes:
        for job in jobs:
            succeeded, result = _attempt(work, job)
            yield job, result if succeeded else Crash(result)
        return
    waiting = list(reversed(jobs))
    context = multiprocessing.get_context("spawn")
    busy: list[_Worker[Job, Result]] = []
    try:
        while len(busy) < processes and waiting:
            busy.append(_Worker(context, work, waiting.pop()))
        while busy:
            for worker in [w for w in busy if w.connection in _ready(busy)]:
                job, result = worker.job, worker.collect()
                if waiting and worker.alive:
                    worker.give(waiting.pop())
                else:
                    worker.end()
                    busy.remove(worker)
                    if waiting:
                        busy.append(_Worker(context, work, waiting.pop()))
                yield job, result
    finally:
        for worker in busy:
            worker.end()


class _Worker(Generic[Job, Result]):
    """A process and the job that it has."""

    def __init__(self, context: SpawnContext, work: Callable[[Job], Result], job: Job) -> None:
        self.connection, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, work), daemon=True)
        self._process.start()
        remote.close()  # or the end of the process would not end the connection
        self.give(job)

    @property
    def alive(self) -> bool:
        """Whether it can take another job."""
        return self._process.is_alive()

    def give(self, job: Job) -> None:
        """Begins a job."""
        self.job = job
        self.connection.send(job)

    def collect(self) -> Result | Crash:
        """What became of it."""
        try:
            succeeded, result = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return Crash(f"the process died with exit code {self._process.exitcode}")
        return result if succeeded else Crash(result)

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _ready(workers: Sequence[_Worker[Any, Any]]) -> list[Any]:
    return wait([worker.connection for worker in workers])


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    # An interrupt reaches all processes of a terminal: who began them decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(work, job))


def _attempt(work: Callable[[Any], Any], job: Any) -> tuple[bool, Any]:
    try:
        return True, work(job)
    except Exception:  # noqa: BLE001 - whatever it is, the others go on and it is reported
        return False, traceback.format_exc()
