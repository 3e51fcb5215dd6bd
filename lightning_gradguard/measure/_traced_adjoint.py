"""The adjoint of every state of a module that notes its states while it runs.

Shape suffixes: ``T`` time, ``B`` batch, ``S`` boundaries between timesteps, ``R`` the sequences
that are alive at a timestep, ``F`` any features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.measure._taps import feature_norms
from lightning_gradguard.measure.adjoint import RecurrentAdjoint
from lightning_gradguard.nn._scan import Gradients, Trace


def traced_adjoint(
    trace: Trace, gradients: Gradients, *, has_cell: bool = False
) -> RecurrentAdjoint:
    """Go back from the gradients of what a module returned, before autograd does.

    The graph is left as it is, and nothing is accumulated in any ``.grad``. Besides the whole way
    back, the last gradient that enters each sequence is followed alone in each layer and direction
    that gets others too.

    Args:
        trace: Of the forward pass, its graph not yet used up.
        gradients: Of its results; ``None`` for one that has none.
        has_cell: Whether the second tensor of its state is the cell state of an LSTM.
    """
    parts = [
        _Part(trace, part, has_cell=has_cell)
        for part in sorted({step.part for step in trace.steps})
    ]
    wanted = [tensor for part in parts for tensor in part.tensors]
    found = iter(_gradients(trace.results, gradients, wanted))
    for part in parts:
        part.take([next(found) for _ in part.tensors])
    cells = [part.cell_TBF for part in parts]
    inputs_TBI = parts[0].input_TBI
    for part in parts[1:]:
        if part.x._base is parts[0].x._base:  # noqa: SLF001 - views of what the module was given
            inputs_TBI = inputs_TBI + part.input_TBI
    return RecurrentAdjoint(
        hidden=torch.stack([part.hidden_TBF for part in parts]),
        cell=None if cells[0] is None else torch.stack([c for c in cells if c is not None]),
        input=inputs_TBI,
        arriving=torch.stack([part.across(part.arriving_TB) for part in parts]),
        transported=torch.stack([part.across(part.sent_TB) for part in parts]),
        followed=torch.stack([part.followed() for part in parts]),
        input_norms=torch.stack([feature_norms(part.input_TBI) for part in parts]),
        lengths=parts[0].lengths_B,
        causes=tuple({} for _ in parts),
    )


class _Part:
    """One layer and direction.

    Attributes:
        tensors: Of its graph, whose gradients are wanted.
        lengths_B: Length of each sequence.
    """

    def __init__(self, trace: Trace, part: int, *, has_cell: bool) -> None:
        steps = [step for step in trace.steps if step.part == part]
        self._reverse = len(steps) > 1 and steps[0].time > steps[-1].time
        self._steps = sorted(steps, key=lambda step: step.time)
        self.x = trace.inputs[part]
        self.tensors = [self.x]
        for step in self._steps:
            # Of a cell state also itself, whose gradient holds what comes through h.
            self.tensors += [*step.passed, *step.given, *(step.made[1:2] if has_cell else ())]
        self._alive = [step.passed[0].size(0) for step in self._steps]
        alive_T1 = torch.tensor(self._alive).unsqueeze(1)
        self.lengths_B = (alive_T1 > torch.arange(max(self._alive))).sum(0)

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Take in the gradients of :attr:`tensors`."""
        x_grad, *rest = gradients
        self.input_TBI = x_grad if x_grad.dim() == 3 else _filled(x_grad.split(self._alive))
        size = len(rest) // len(self._steps)
        states = len(self._steps[0].passed)
        steps = [rest[start : start + size] for start in range(0, len(rest), size)]
        self._passed = [step[:states] for step in steps]
        self._given = [step[states : 2 * states] for step in steps]
        cells = [cell for step in steps for cell in step[2 * states :]]
        self.hidden_TBF = _filled([step[0] for step in self._passed])
        self.cell_TBF = _filled(cells) if cells else None
        self.arriving_TB = _filled([_joint(step) for step in self._passed])
        self.sent_TB = _filled([_joint(step) for step in self._given])

    def across(self, norms_TB: Tensor) -> Tensor:
        """(S, B) of the timesteps at that side of each boundary from which the adjoint goes on."""
        if not self._reverse:
            return norms_TB[1:]
        times_S1 = torch.arange(1, len(norms_TB)).unsqueeze(1)
        exists_SB = (times_S1 < self.lengths_B).to(norms_TB.device)
        return norms_TB[:-1] * exists_SB

    def followed(self) -> Tensor:
        """(T, B) norm of the last gradient that enters each sequence, followed alone."""
        enters_TB = self._enters()
        if self._reverse:
            later_TB = enters_TB.cumsum(0) - enters_TB.long()
        else:
            later_TB = enters_TB.flip(0).cumsum(0).flip(0) - enters_TB.long()
        if not (enters_TB & (later_TB > 0)).any():
            return self.arriving_TB
        last_TB = enters_TB & (later_TB == 0)
        outputs, signals = [], []
        for step, state, last_B in zip(self._steps, self._passed, last_TB, strict=True):
            for tensor, grad in zip(step.passed, state, strict=True):
                outputs.append(tensor)
                signals.append(torch.where(_over(last_B, grad), grad, 0.0))
        wanted = [tensor for step in self._steps for tensor in step.passed]
        found = iter(_gradients(outputs, signals, wanted))
        followed = [_joint([next(found) for _ in step.passed]) for step in self._steps]
        return _filled(followed)

    def _enters(self) -> Tensor:
        """(T, B) whether a state gets a gradient from elsewhere than the next timestep."""
        enters = []
        times = range(len(self._steps))
        for time in times:
            after = time - 1 if self._reverse else time + 1
            sent = self._given[after] if after in times else []
            here_R = torch.zeros(self._alive[time], dtype=torch.bool, device=self.x.device)
            for number, grad in enumerate(self._passed[time]):
                direct = grad
                if sent:
                    both = min(len(grad), len(sent[number]))
                    direct = torch.cat([grad[:both] - sent[number][:both], grad[both:]])
                here_R |= (direct != 0).flatten(1).any(1)
            enters.append(here_R)
        return _filled(enters)


def _gradients(
    results: Sequence[Tensor], gradients: Sequence[Tensor | None], wanted: Sequence[Tensor]
) -> list[Tensor]:
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None]
    pairs = [(result, grad) for result, grad in pairs if result.requires_grad]
    asked = [tensor for tensor in wanted if tensor.requires_grad]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            asked,
            [grad for _, grad in pairs],
            retain_graph=True,
            allow_unused=True,
        )
    )
    all_found = [next(found) if tensor.requires_grad else None for tensor in wanted]
    return [
        torch.zeros_like(tensor) if grad is None else grad
        for tensor, grad in zip(wanted, all_found, strict=True)
    ]


def _joint(state: Sequence[Tensor]) -> Tensor:
    """(R,) norm of all tensors of a state together."""
    norms = torch.stack([feature_norms(grad.flatten(1)) for grad in state])
    joint: Tensor = torch.linalg.vector_norm(norms, dim=0)
    return joint


def _over(mask_R: Tensor, grad: Tensor) -> Tensor:
    return mask_R[: len(grad)].view(-1, *[1] * (grad.dim() - 1))


def _filled(parts: Sequence[Tensor]) -> Tensor:
    """(T, B, …) of what has a row for each sequence that is alive, 0 for the others."""
    rows = max(len(part) for part in parts)
    if all(len(part) == rows for part in parts):
        return torch.stack(list(parts))
    return torch.stack(
        [torch.cat([part, part.new_zeros((rows - len(part), *part.shape[1:]))]) for part in parts]
    )
