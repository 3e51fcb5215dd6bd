"""One layer in one direction, timestep by timestep, for plain and packed sequences alike.

Shape suffixes: ``T`` time, ``B`` batch, ``N`` all timesteps of all sequences that are packed, ``I``
input, ``H`` hidden; ``R`` the sequences that are alive at a timestep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

States = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]


class Cell(ABC):
    """The equations of one layer in one direction, with its weights.

    Attributes:
        computed: Places of the states that :meth:`step` computes, if it only moves the others from
            place to place, to be read once more; ``None`` if it computes all of them.
    """

    computed: frozenset[int] | None = None

    @abstractmethod
    def project(self, x: Tensor) -> States:
        """What does not depend on the state, for all timesteps at once.

        Args:
            x: ``(T, B, I)``, or ``(N, I)`` if packed.

        Returns:
            Tensors whose leading dimensions are those of ``x``.
        """

    @abstractmethod
    def step(self, number: int, projected: States, states: States) -> States:
        """The state after one timestep; its first tensor, ``(R, H)``, is the output.

        Args:
            number: Of the timestep, counted in the direction of the layer.
            projected: What :meth:`project` gives for this timestep, each ``(R, …)``.
            states: The state before it, each ``(R, …)``.
        """


@dataclass(frozen=True, eq=False)
class TracedStep:
    """The states around one timestep, each a tensor of the graph of its own.

    Attributes:
        part: Layer and direction, counted as in torch: l0, l0_reverse, l1, …
        time: The timestep, in real time for reverse directions too.
        given: What the timestep began with: its gradient is what goes back through the timestep.
        made: What it computed: its gradient is the whole adjoint of each tensor.
        passed: The same, as it goes on to the output and to the next timestep: the gradient of c
            is without what comes through h.
    """

    part: int
    time: int
    given: States
    made: States
    passed: States


@dataclass(eq=False)
class Trace:
    """All timesteps of one forward pass, while somebody wants to know of them.

    Attributes:
        arrived: Called with this and the gradients of :attr:`results` (``None`` for one that has
            none), all at once, before the gradient of any state exists.
        steps: In the order in which they were computed.
        inputs: Of each layer and direction, as a tensor of the graph of its own.
        results: What the traced pass returned: its output, then the last states of each part. The
            module may have returned the same from elsewhere.
    """

    arrived: Callable[[Trace, Gradients], None]
    steps: list[TracedStep] = field(default_factory=list)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    results: States = ()

    def returns(self, output: Tensor, ends: Sequence[States]) -> tuple[Tensor, list[States]]:
        """What the module is to return instead, so that :attr:`arrived` is called.

        Args:
            output: Its output.
            ends: Its last states.
        """
        flat = flattened(output, ends)
        self.results = self.results or flat
        output, *rest = _Announced.apply(self, *flat)  # type: ignore[no-untyped-call]
        states = iter(rest)
        return output, [tuple(next(states) for _ in end) for end in ends]


def flattened(output: Tensor, ends: Sequence[States]) -> States:
    """In one tuple."""
    return (output, *(state for end in ends for state in end))


class _Announced(torch.autograd.Function):
    """Identity; its backward pass comes before that of everything in the trace."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, *results: Tensor) -> States:
        ctx.trace = trace
        ctx.set_materialize_grads(False)
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.trace.arrived(ctx.trace, gradients)
        return (None, *gradients)


def scan(
    cell: Cell,
    x: Tensor,
    states: States,
    batch_sizes: Sequence[int] | None,
    *,
    reverse: bool = False,
    trace: Trace | None = None,
    part: int = 0,
) -> tuple[Tensor, States]:
    """Run a cell over sequences.

    Args:
        cell: The cell.
        x: ``(T, B, I)``, or ``(N, I)`` if packed, longest sequence first.
        states: The state before the first timestep, each ``(B, …)``.
        batch_sizes: How many sequences are alive at each timestep, if packed.
        reverse: Go from the end of each sequence to its beginning.
        trace: Where to note all states.
        part: Layer and direction, for the trace.

    Returns:
        The output, in the layout of ``x``, and the state after the last timestep of each sequence.
    """
    x = x.view_as(x)
    if trace is not None:
        trace.inputs[part] = x
    projected = _by_timestep(cell.project(x), batch_sizes)
    first, finished = states, []
    viewed = cell.computed if trace is None else None
    if batch_sizes is not None and reverse:
        states = _rows(states, 0, batch_sizes[-1])
    outputs: list[Tensor] = [x] * len(projected)
    order = range(len(projected))
    for number, time in enumerate(reversed(order) if reverse else order):
        alive, known = projected[time][0].size(0), states[0].size(0)
        if alive < known:
            finished.append(_rows(states, alive, known))
            states = _rows(states, 0, alive)
        elif alive > known:
            states = _joined(states, _rows(first, known, alive))
        # Views also where nobody looks: gradients are added in the same order then, bit for bit.
        given = _views(states, viewed)
        made = cell.step(number, projected[time], given)
        states = _views(made, viewed)
        if trace is not None:
            trace.steps.append(TracedStep(part, time, given, made, states))
        outputs[time] = states[0]
    for rest in reversed(finished):
        states = _joined(states, rest)
    return torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), states


def _by_timestep(projected: States, batch_sizes: Sequence[int] | None) -> list[States]:
    if batch_sizes is None:
        parts = [tensor.unbind(0) for tensor in projected]
    else:
        parts = [tensor.split(list(batch_sizes)) for tensor in projected]
    return list(zip(*parts, strict=True))


def _rows(states: States, start: int, stop: int) -> States:
    return tuple(state[start:stop] for state in states)


def _joined(states: States, more: States) -> States:
    return tuple(torch.cat(pair) for pair in zip(states, more, strict=True))


def _views(states: States, places: frozenset[int] | None) -> States:
    return tuple(
        state.view_as(state) if places is None or place in places else state
        for place, state in enumerate(states)
    )
