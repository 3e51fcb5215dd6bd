"""Ω of Pascanu et al. 2013 from explicit Jacobians of unrolled cells, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.measure.recurrent_cases import Built
from tests.measure.recurrent_cells import step_of
from tests.measure.recurrent_reference import Unrolled, batched, flow, time_major


def omega_twin(built: Built, *, one_sided: bool = False) -> Tensor:
    """The sum over k of the mean over t of (ρ - 1)², with a graph to the weights."""
    unrolled = _unrolled(built)
    parts = []
    for k in unrolled.ks:
        gains = _gains(unrolled, k)
        if gains:
            off = torch.stack(gains) - 1.0
            parts.append((off.clamp(max=0.0) if one_sided else off).square().mean())
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def _unrolled(built: Built) -> Unrolled:
    unrolled = Unrolled(built.rnn, built.input, built.hx, None)
    grads = built.grads
    loss = unrolled.output_TBO.sum() * 0.0
    if "grad_output" in grads:
        loss = loss + (unrolled.output_TBO * time_major(built.rnn, grads["grad_output"])).sum()
    if "grad_hn" in grads:
        loss = loss + (unrolled.last("hidden") * batched(grads["grad_hn"])).sum()
    if "grad_cn" in grads:
        loss = loss + (unrolled.last("carry") * batched(grads["grad_cn"])).sum()
    unrolled.differentiate(loss)
    return unrolled


def _gains(unrolled: Unrolled, k: int) -> list[Tensor]:
    step = step_of(unrolled.rnn, k)
    reverse = bool(k % 2) and unrolled.rnn.bidirectional
    arriving: dict[int, list[Tensor]] = {}
    sent: dict[int, list[Tensor]] = {}
    for b, length in enumerate(unrolled.lengths):
        for boundary, here, there in flow(length, reverse=reverse):
            trace = unrolled.traces[b][k]
            state = [getattr(trace, name)[here].detach() for name in unrolled.states]
            adjoint = torch.cat([unrolled.grads[name, k, there, b] for name in unrolled.states])
            jacobian = _jacobian(step, trace.entered[there].detach(), state)
            arriving.setdefault(boundary, []).append(adjoint.detach())
            sent.setdefault(boundary, []).append(jacobian.T @ adjoint.detach())
    return [
        torch.cat(sent[t]).norm() / torch.cat(arriving[t]).norm()
        for t in arriving
        if torch.cat(arriving[t]).norm() > 0.0
    ]


def _jacobian(step: Any, x: Tensor, state: list[Tensor]) -> Tensor:
    sizes = [len(part) for part in state]

    def together(flat: Tensor) -> Tensor:
        return torch.cat(step(x, flat.split(sizes))[0])

    return torch.autograd.functional.jacobian(together, torch.cat(state), create_graph=True)
