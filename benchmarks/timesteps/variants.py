"""What a training step does beyond training. Each variant sets up once and yields its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from benchmarks.timesteps.models import Task
from lightning_gradguard.measure.adjoint import recurrent_adjoint
from lightning_gradguard.measure.timesteps import TimestepProbe

Step = Callable[[], None]
Variant = Callable[[Task], AbstractContextManager[Step]]

PLAIN = "plain"


@contextmanager
def plain(task: Task) -> Iterator[Step]:
    """Training and nothing else."""
    yield task.step


@contextmanager
def input_gradient(task: Task) -> Iterator[Step]:
    """Autograd computes the gradient of the input, and nobody looks at it."""

    def step() -> None:
        task.inputs.grad = None
        task.step()

    task.inputs.requires_grad_()
    try:
        yield step
    finally:
        task.inputs.requires_grad_(False)
        task.inputs.grad = None


@contextmanager
def asleep(task: Task) -> Iterator[Step]:
    """The probe of a guard between two measurements."""
    with TimestepProbe(task.model) as probe:
        probe.exact = probe.watching = False
        yield task.step


@contextmanager
def cheap(task: Task) -> Iterator[Step]:
    """A probe that sees every step and whose measurement is discarded."""
    with TimestepProbe(task.model) as probe:
        probe.exact = False

        def step() -> None:
            task.backward()
            probe.discard()
            task.optimizer.step()

        yield step


@contextmanager
def cheap_read(task: Task) -> Iterator[Step]:
    """A cheap measurement that is turned into readings."""
    yield from _measured(task, exact=False)


@contextmanager
def exact(task: Task) -> Iterator[Step]:
    """An exact measurement: capture, adjoint of every state, readings."""
    yield from _measured(task, exact=True)


def _measured(task: Task, *, exact: bool) -> Iterator[Step]:
    with TimestepProbe(task.model) as probe:
        probe.exact = exact

        def step() -> None:
            task.backward()
            probe.measure()
            task.optimizer.step()

        yield step


@contextmanager
def adjoint(task: Task) -> Iterator[Step]:
    """No training step, only the gradients of all states of the whole batch."""
    rnn = task.classifier.rnn
    with torch.no_grad():
        input_TBI = task.classifier.embedding(task.inputs)
        output_TBH, _ = rnn(input_TBI)
    grad_TBH = task.direct_gradient(output_TBH)

    def step() -> None:
        recurrent_adjoint(rnn, input_TBI, grad_output=grad_TBH)

    yield step


@contextmanager
def unrolled(task: Task) -> Iterator[Step]:
    """Training of cells in a loop, which leaves the gradient of each state behind."""
    yield task.unrolled().step


# For each way in which the module gets its input; an embedding needs the gradient anyway.
CHEAP: dict[str, dict[str, Variant]] = {
    "data": {
        "control": plain,
        "input_gradient": input_gradient,
        "asleep": asleep,
        "cheap": cheap,
        "cheap_read": cheap_read,
    },
    "embedding": {"control": plain, "asleep": asleep, "cheap": cheap, "cheap_read": cheap_read},
}
EXACT: dict[str, Variant] = {"exact": exact, "adjoint": adjoint, "unrolled": unrolled}
