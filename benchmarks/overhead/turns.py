"""Several ``Trainer.fit`` in one process, of which one trains at a time, a few steps each in turn.

Every fit runs in a thread of its own and asks for its batches from a feed that holds it back when
its turn is over. The clock of a turn starts and stops in that thread, so changing over is not in
it. Between one batch and the next lies exactly one whole step, with every hook of every callback.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer

from benchmarks.overhead.contenders import LOG_EVERY_N_STEPS
from benchmarks.overhead.workloads import Batch

# From glibc's <malloc.h>: M_ARENA_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (at most 32 MiB).
_MALLOC_OPTIONS = ((-8, 1), (-1, 1 << 30), (-3, 32 << 20))


def share_one_heap() -> bool:
    """Let all threads allocate from the main heap, as a Trainer in the main thread does.

    Every thread has a heap of its own otherwise, which gives large blocks back and asks for them
    anew in every step: that costs a third of a step, and not the same third in every thread.

    Returns:
        Whether it could be set: only glibc knows these switches.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(bool(mallopt(*values)) for values in _MALLOC_OPTIONS)
    return False


class Turn(NamedTuple):
    """What a few steps took.

    Args:
        wall: Seconds by the clock.
        cpu: Seconds of processor time of the whole process, in which nothing else runs meanwhile.
        logs: Whether one of the steps was one on which values are logged.
    """

    wall: float
    cpu: float
    logs: bool


class Runner:
    """One fit that goes on only when told to."""

    def __init__(self, trainer: Trainer, module: LightningModule, batches: list[Batch]) -> None:
        self.trainer = trainer
        self._steps_left = 0
        self._stopping = False
        self._anomaly_detection = False
        self._on_gpu = batches[0][0].device.type == "cuda"
        self._batches = batches
        self._go = threading.Semaphore(0)
        self._held = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._started_at = self._ended_at = (0.0, 0.0)
        self._thread = threading.Thread(target=self._fit, args=(module,), daemon=True)
        self._thread.start()
        self._wait()

    def take_turn(self, steps: int) -> Turn:
        """Train ``steps`` steps."""
        before = self.trainer.global_step
        self._steps_left = steps
        self._go.release()
        self._wait()
        wall, cpu = (b - a for a, b in zip(self._started_at, self._ended_at, strict=True))
        after = self.trainer.global_step
        return Turn(wall, cpu, after // LOG_EVERY_N_STEPS > before // LOG_EVERY_N_STEPS)

    def stop(self) -> None:
        """End the fit as at the end of its data."""
        self._stopping = True
        self._go.release()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        self._held.acquire()
        if self._error is not None:
            raise self._error

    def _fit(self, module: LightningModule) -> None:
        try:
            self.trainer.fit(module, self._feed())
        except BaseException as error:  # noqa: BLE001 - raised again where the turns are taken
            self._error = error
        finally:
            self._held.release()

    def _feed(self) -> Iterator[Batch]:
        for batch in itertools.cycle(self._batches):
            if self._steps_left == 0:
                self._hold()
                if self._stopping:
                    return
            self._steps_left -= 1
            yield batch

    def _hold(self) -> None:
        self._ended_at = self._now()
        # A switch of the whole process, unlike the gradient mode, which is a thread's own.
        self._anomaly_detection = torch.is_anomaly_enabled()
        torch.autograd.set_detect_anomaly(False)
        self._held.release()
        self._go.acquire()
        torch.autograd.set_detect_anomaly(self._anomaly_detection)
        self._started_at = self._now()

    def _now(self) -> tuple[float, float]:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()
