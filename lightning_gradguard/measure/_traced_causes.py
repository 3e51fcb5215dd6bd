"""What the decay follows from, in modules of this package that note their states while they run.

Shape suffixes: ``N`` all timesteps of all sequences, ``I`` input, ``H`` hidden, ``G`` what goes
into an activation or into gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear
from torch.nn.utils.parametrize import is_parametrized

from lightning_gradguard.measure._recurrent_kinds import recurrent_kind
from lightning_gradguard.measure._taps import is_plain
from lightning_gradguard.measure.spectral import spectral_radius
from lightning_gradguard.nn._scan import Trace, TracedStep

_OURS = "lightning_gradguard.nn."


def traced_causes(module: Any, trace: Trace) -> tuple[dict[str, Tensor], ...]:
    """As :attr:`RecurrentAdjoint.causes`, for each part of a trace whose graph is not used up.

    ``forget_gate`` is the share of c that a timestep keeps, ``update_gate`` that of h; a unit that
    is copied, by a skip or by zoneout, is kept whole. Without either these are the gates.

    Empty where they are not known: of equations that are not this package's own, of parametrized
    weights, which reading may change, and of a GRU whose layers share a skip gate, since what goes
    from layer to layer is not in the trace.

    Args:
        module: That made the trace.
        trace: Of its forward pass.
    """
    numbers = sorted({step.part for step in trace.steps})
    parts = [[step for step in trace.steps if step.part == number] for number in numbers]
    kind = recurrent_kind(module)
    unknown: tuple[dict[str, Tensor], ...] = tuple({} for _ in parts)
    if not type(module)._cell.__module__.startswith(_OURS):  # noqa: SLF001 - whose equations
        return unknown
    if kind == "lstm":
        return tuple({"forget_gate": _kept_of_c(module, steps)} for steps in parts)
    if kind == "other" or not _can_read_weights(module, len(parts)):
        return unknown
    with torch.no_grad(), torch.autocast(trace.inputs[0].device.type, enabled=False):
        return tuple(
            _from_weights(kind, module, number, trace.inputs[number], steps)
            for number, steps in zip(numbers, parts, strict=True)
        )


def _kept_of_c(module: Any, steps: Sequence[TracedStep]) -> Tensor:
    """Mean of dc_t/dc_{t-1}, which is diagonal: h_{t-1} is another tensor of the graph.

    Where the first c is a constant, no gradient goes back through the first timestep, and it does
    not count.
    """
    places = _places_of_c(module, len(steps[0].given))
    pairs = [(step.made[place], step.given[place]) for step in steps for place in places]
    kept = [
        torch.autograd.grad(made, given, torch.ones_like(made), retain_graph=True)[0]
        for made, given in pairs
        if given.requires_grad
    ]
    if not kept:
        return steps[0].made[0].new_full((), torch.nan)
    return torch.cat([share.flatten() for share in kept]).mean(dtype=torch.float32)


def _places_of_c(module: Any, count: int) -> tuple[int, ...]:
    """Where c stands in a state of ``count`` tensors."""
    names = module.state_names
    if "c" not in names:  # the last k of h, and then c
        return (count - 1,)
    return tuple(range(1, count - ("gate" in names), 2))  # of each layer h and c


def _can_read_weights(module: nn.Module, parts: int) -> bool:
    own = dict(module.named_parameters())
    layers = sum(name.startswith("weight_hh") for name in own)
    return layers == parts and not is_parametrized(module) and all(map(is_plain, own.values()))


def _from_weights(
    kind: str, module: Any, part: int, x: Tensor, steps: Sequence[TracedStep]
) -> dict[str, Tensor]:
    """What follows from the weights, the input and the states of one layer and direction."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    own = module._weights(part)  # noqa: SLF001 - by the names that they have in each layer
    weights = {name: weight.detach().to(dtype) for name, weight in own.items()}
    steps = sorted(steps, key=lambda step: step.time)
    x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
    h_NH = torch.cat([step.given[0] for step in steps])
    read = h_NH.to(dtype)
    matrix = weights["weight_hh"]
    if "weight_sh" in weights:
        older_NH = torch.cat([step.given[module.skip - 1] for step in steps]).to(dtype)
        read = torch.cat((read, older_NH), dim=-1)
        matrix = torch.cat((matrix, weights["weight_sh"]), dim=-1)
    if kind == "gru":
        gates_NG = _reset_and_update(weights, x_NI, read, matrix, getattr(module, "eps", 0.0))
        update_NH = gates_NG.chunk(2, dim=-1)[1].sigmoid()
        copied_NH = torch.cat([step.made[0] for step in steps]) == h_NH
        return {"update_gate": torch.where(copied_NH, 1.0, update_NH).mean()}
    sums_NH = linear(x_NI, weights["weight_ih"]) + linear(read, matrix)
    sums_NH = sums_NH + weights.get("bias_ih", 0.0) + weights.get("bias_hh", 0.0)
    causes = {"activation_slope": _slope(kind, sums_NH, module, weights).mean()}
    if matrix.shape[0] == matrix.shape[1]:  # which is the whole recurrence then
        causes["spectral_radius"] = spectral_radius(matrix)
    return causes


def _reset_and_update(
    weights: Mapping[str, Tensor], x_NI: Tensor, read: Tensor, matrix: Tensor, eps: float
) -> Tensor:
    """What goes into the gates r and z of a GRU, under a norm of both if it has one."""
    rows = 2 * (len(matrix) // 3)
    sums_NG = x_NI.new_zeros(())
    for name, value, weight in (("ih", x_NI, weights["weight_ih"]), ("hh", read, matrix)):
        part_NG = linear(value, weight[:rows])
        gain, bias = weights.get(f"gain_{name}"), weights.get(f"bias_{name}")
        if gain is not None:
            part_NG = layer_norm(part_NG, (rows,), gain[:rows], None, eps)
        sums_NG = sums_NG + (part_NG if bias is None else part_NG + bias[:rows])
    return sums_NG


def _slope(kind: str, sums_NH: Tensor, module: Any, weights: Mapping[str, Tensor]) -> Tensor:
    """Of the activation."""
    if kind == "tanh":
        return 1.0 - sums_NH.tanh().square()
    below = {"relu": 0.0, "leaky_relu": getattr(module, "negative_slope", 0.0)}
    slope = weights.get("slope", sums_NH.new_tensor(below.get(kind, 0.0)))
    return torch.where(sums_NH > 0, 1.0, slope)
