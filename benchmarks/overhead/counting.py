"""Exactly how many torch operations a step calls, and how often the host reads the device."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.overhead.contenders import Contender
from benchmarks.overhead.workloads import Batch, Workload

# Reads that do not pass through the dispatcher on a CPU, or as something else.
_READS = ("tolist", "numpy", "__array__")
_COPIES = ("to", "cpu")

# Between two steps on which the guard looks at every layer: what those cost is timed instead.
WARM_STEPS = 42
COUNTED_STEPS = 7


class StepCounts(NamedTuple):
    """One step.

    Args:
        calls: Calls of ``aten`` operations, Lightning's and the model's own included.
        host_reads: How often the host read a value of the device that was not in host memory
            since an earlier step.
        names: Calls by operation.
    """

    calls: int
    host_reads: int
    names: Counter[str]


class OperationCounter(TorchDispatchMode):
    """Counts what is called inside it.

    A host read is a call that has to wait until the device has computed the value: ``item``,
    ``bool``, ``tolist``, ``numpy``, and a blocking copy from an accelerator to the host. A copy
    that was sent to host memory in an earlier step has long arrived: reading it is no host read.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()
        self.host_reads = 0
        self.step = 0
        self._copies = WeakIdKeyDictionary()
        self._inside = False
        self._stack = ExitStack()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            self.names[func.overloadpacket.__name__] += 1
        if not self._inside and _waits_for_device(func, args, kwargs):
            self._count_read(args[0])
        return func(*args, **kwargs)

    def patched(self) -> ExitStack:
        """Watch the methods of tensors that the dispatcher does not see; close it to undo."""
        stack = ExitStack()
        wrappers = (
            (_READS, self._reading),
            (_COPIES, self._copying),
            (("copy_",), self._sending),
        )
        for names, wrap in wrappers:
            for name in names:
                own = name in vars(Tensor)
                original = getattr(Tensor, name)
                setattr(Tensor, name, wrap(original))
                stack.callback(
                    *((setattr, Tensor, name, original) if own else (delattr, Tensor, name))
                )
        stack.callback(setattr, torch, "tensor", torch.tensor)
        torch.tensor = self._making(torch.tensor)
        return stack

    def take(self) -> StepCounts:
        """What was counted since the last call."""
        counts = StepCounts(sum(self.names.values()), self.host_reads, self.names)
        self.names, self.host_reads = Counter(), 0
        self.step += 1
        return counts

    def _count_read(self, tensor: Tensor) -> None:
        arrived = tensor in self._copies and self._copies[tensor] < self.step
        self.host_reads += not arrived

    def _reading(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapper(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            outer, self._inside = self._inside, True
            try:
                result = method(tensor, *args, **kwargs)
            finally:
                self._inside = outer
            if not outer:
                self._count_read(tensor)
            return result

        return wrapper

    def _making(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A tensor made of a list of tensors reads each of them."""

        @functools.wraps(make)
        def wrapper(data: Any, *args: Any, **kwargs: Any) -> Tensor:
            for tensor in data if isinstance(data, (list, tuple)) else ():
                if isinstance(tensor, Tensor):
                    self._count_read(tensor)
            outer, self._inside = self._inside, True
            try:
                return make(data, *args, **kwargs)
            finally:
                self._inside = outer

        return wrapper

    def _copying(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """On a CPU, a copy of its own stands for one that is sent from an accelerator."""

        @functools.wraps(method)
        def wrapper(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = method(tensor, *args, **kwargs)
            if result is not tensor and result.device.type == "cpu":
                self._copies[result] = self.step
            return result

        return wrapper

    def _sending(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Into host memory that was there before, as a copy to pinned memory is."""

        @functools.wraps(method)
        def wrapper(tensor: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = method(tensor, source, *args, **kwargs)
            if source.is_cuda and not tensor.is_cuda:
                self._copies[tensor] = self.step
            return result

        return wrapper


def _waits_for_device(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    name = func.overloadpacket.__name__
    if name in ("_local_scalar_dense", "nonzero"):
        return True
    if name == "_to_copy":
        from_device, to = args[0].is_cuda, kwargs.get("device")
        to_host = to is not None and torch.device(to).type == "cpu"
        return from_device and to_host and not kwargs.get("non_blocking")
    if name == "copy_":
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return bool(args[1].is_cuda and not args[0].is_cuda and blocking)
    return False


def count_steps(
    workload: Workload, contender: Contender, *, optimizer: str, device: str, directory: Path
) -> list[StepCounts]:
    """Counts of some healthy steps of a real fit, after ``WARM_STEPS`` others."""
    counter = OperationCounter()
    counts: list[StepCounts] = []
    module = workload.make_module(optimizer)
    trainer = contender.make_trainer(module, directory, device)
    # The methods stay watched all the time: a copy that is sent before the first counted step may
    # be read in it.
    with counter.patched():
        trainer.fit(module, _counted_feed(workload.make_batches(device), counter, counts))
    return counts


def _counted_feed(
    batches: list[Batch], counter: OperationCounter, counts: list[StepCounts]
) -> Iterator[Batch]:
    """Between one batch and the next lies one whole step."""
    endless = itertools.cycle(batches)
    for _ in range(WARM_STEPS):
        yield next(endless)
        counter.take()
    for _ in range(COUNTED_STEPS):
        with counter:
            yield next(endless)
        counts.append(counter.take())


def added_counts(counts: list[StepCounts], bare: list[StepCounts]) -> dict[str, Any]:
    """What a contender adds to a bare step, as plain values."""
    base_calls = statistics.median(step.calls for step in bare)
    base_reads = statistics.median(step.host_reads for step in bare)
    calls = [step.calls - base_calls for step in counts]
    reads = [step.host_reads - base_reads for step in counts]
    return {
        "aten_calls": statistics.median(calls),
        "aten_calls_most": max(calls),
        "host_reads": statistics.median(reads),
        "host_reads_most": max(reads),
    }
