"""How the gradients of a fixed list of parameters are read: sorted once, used on every step.

Shape suffixes: ``P`` parameters, ``N`` parameters of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradguard.measure._sharded import (
    Layout,
    ShardedGroup,
    combine_norms,
    has_pending_sum,
    is_dtensor,
    layout_of,
    local_part,
    mesh_device,
)

# Many small tensors of one shape: on a CPU `_foreach_norm` is a loop that costs 1 us for each of
# them, while copying them into one tensor and reducing that costs 0.1 us. The copy stops paying
# at about 8,000 elements, and below 8 tensors it saves less than the calls around it cost. Only the
# most frequent shapes are stacked, so that the number of calls stays bounded.
_SMALL_NUMEL = 4096
_MANY = 8
_MAX_STACKS = 4


class StalePlanError(Exception):
    """The gradients are no longer of the kind that the plan was made for."""


@dataclass(frozen=True)
class Batch:
    """Gradients on one device and of one dtype, whose norms are taken in one call.

    Attributes:
        device: Where the gradients are.
        dtype: In which the squares are summed.
        plain: Parameters whose gradient is an ordinary dense real tensor.
        converted: Parameters whose gradient needs :func:`stored_values`.
        reduce_dims: When all ``plain`` gradients are small and of one shape: the dimensions to
            reduce once they are stacked.
    """

    device: torch.device
    dtype: torch.dtype
    plain: tuple[Tensor, ...]
    converted: tuple[Tensor, ...] = ()
    reduce_dims: tuple[int, ...] = ()

    def norms(self) -> Tensor:
        """Return the L2 norms, shape ``(N,)``, the converted ones last."""
        grads = [parameter.grad for parameter in self.plain]
        if self.reduce_dims:
            stacked = torch.stack(grads)  # type: ignore[arg-type]  # None raises TypeError
            norms_N = torch.linalg.vector_norm(stacked, 2, self.reduce_dims, dtype=self.dtype)
        else:
            grads += [stored_values(parameter) for parameter in self.converted]
            norms_N = norm_each(grads, self.dtype)  # type: ignore[arg-type]
        if norms_N.device != self.device or type(norms_N) is not Tensor:
            raise StalePlanError
        return norms_N


def norm_each(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the L2 norm of each tensor, shape ``(len(tensors),)``, squares summed in ``dtype``."""
    try:
        norms: Sequence[Tensor] = torch._foreach_norm(tensors, 2, dtype=dtype)
    except (AttributeError, RuntimeError):
        # A private function: it may be gone, or not serve this backend. Tensors that have no norm
        # at all raise the same error again here.
        norms = [torch.linalg.vector_norm(tensor, 2, dtype=dtype) for tensor in tensors]
    return torch.stack(tuple(norms))


def stored_values(parameter: Tensor) -> Tensor:
    """Return a dense real tensor on this process with the same L2 norm as the gradient."""
    grad = parameter.grad
    if grad is None:
        raise StalePlanError
    if is_dtensor(grad):
        grad = local_part(grad)
    if grad.layout is torch.sparse_coo:
        # Rows that occur twice are to be added before they are squared.
        grad = grad.coalesce().values()
    elif grad.layout is not torch.strided:
        # Copied, as `view_as_real` refuses a view of a tensor that has no strides.
        grad = grad.values().clone()
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    return grad


@dataclass(frozen=True)
class Plan:
    """The batches that together read every gradient, and how their norms come back in order.

    Attributes:
        present: Whether each parameter has a gradient.
        absent: The parameters that have none.
        batches: What is read.
        device: Where the norms are brought together.
        order: Entry of the concatenated batch norms for each parameter, ``None`` when they are in
            order already.
        zero: Norm of every absent gradient, concatenated last; empty when none is absent.
        sharded: The entries that are to be combined over processes.
    """

    present: tuple[bool, ...]
    absent: tuple[Tensor, ...]
    batches: tuple[Batch, ...]
    device: torch.device
    order: Tensor | None
    zero: Tensor
    sharded: tuple[ShardedGroup, ...]

    def local_norms(self) -> Tensor:
        """Return the norm of what this process holds of each gradient, shape ``(P,)``.

        Raises:
            StalePlanError, RuntimeError, TypeError: If the gradients changed in kind since the plan
                was made. This may happen on one process alone, so it is found out before anything
                is sent to the others.
        """
        for parameter in self.absent:
            if parameter.grad is not None:
                raise StalePlanError
        vectors = [batch.norms() for batch in self.batches]
        if self.order is None:
            return vectors[0]
        # The target is never a CPU when any gradient is elsewhere: an asynchronous copy *to* the
        # host could be read before it has arrived.
        moved = [vector.to(self.device, non_blocking=True) for vector in vectors]
        return torch.cat([*moved, self.zero]).index_select(0, self.order)

    def combine(self, values_P: Tensor) -> Tensor:
        """Return the norm of each whole gradient, shape ``(P,)``."""
        return combine_norms(values_P, self.sharded) if self.sharded else values_P


def make_plan(parameters: Sequence[Tensor]) -> Plan:
    """Sort ``parameters`` by the kind of gradient that they have now."""
    grads = [parameter.grad for parameter in parameters]
    plain: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    converted: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    layouts: dict[Layout, list[int]] = {}
    devices: list[torch.device] = []
    for position, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        # A parameter that got no gradient here may have one on another process: its entry takes
        # part in the same collective, as a zero.
        tensor = parameter if grad is None else grad
        if is_dtensor(tensor):
            layout = layout_of(tensor)
            devices.append(mesh_device(tensor))
            if layout.mesh_dims:
                layouts.setdefault(layout, []).append(position)
        devices.append(tensor.device)
        if grad is None:
            continue
        if is_dtensor(grad) or grad.is_complex() or grad.layout is not torch.strided:
            summed = is_dtensor(grad) and has_pending_sum(grad)
            key = (grad.device, grad.dtype.to_real(), summed)
            converted.setdefault(key, []).append(position)
        else:
            plain.setdefault((grad.device, grad.dtype, grad.shape), []).append(position)
    batches, positions = _make_batches(parameters, plain, converted)
    return _assemble(parameters, grads, batches, positions, layouts, _target(devices))


def _make_batches(
    parameters: Sequence[Tensor],
    plain: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]],
    converted: dict[tuple[torch.device, torch.dtype, bool], list[int]],
) -> tuple[list[Batch], list[int]]:
    batches: list[Batch] = []
    positions: list[int] = []
    others: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    stacks = 0
    for (device, dtype, shape), members in sorted(plain.items(), key=lambda item: -len(item[1])):
        small = len(shape) > 0 and shape.numel() <= _SMALL_NUMEL
        stack = small and len(members) >= _MANY and stacks < _MAX_STACKS
        if stack and device.type == "cpu":
            stacks += 1
            dims = tuple(range(1, len(shape) + 1))
            picked = tuple(parameters[i] for i in members)
            batches.append(Batch(device, _accumulate(dtype), picked, reduce_dims=dims))
            positions += members
        else:
            others.setdefault((device, dtype, False), []).extend(members)
    # Gradients that are still to be summed come last: that takes a collective, which must not
    # start before everything that can turn out stale has been looked at.
    for key in sorted(dict.fromkeys([*others, *converted]), key=lambda key: key[2]):
        ordinary, odd = sorted(others.get(key, [])), converted.get(key, [])
        batches.append(
            Batch(
                device=key[0],
                dtype=_accumulate(key[1]),
                plain=tuple(parameters[i] for i in ordinary),
                converted=tuple(parameters[i] for i in odd),
            )
        )
        positions += ordinary + odd
    return batches, positions


def _assemble(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    batches: list[Batch],
    positions: list[int],
    layouts: dict[Layout, list[int]],
    device: torch.device,
) -> Plan:
    count = len(parameters)
    absent = [i for i, grad in enumerate(grads) if grad is None]
    slots = [len(positions)] * count  # absent ones point at the zero behind all norms
    for slot, position in enumerate(positions):
        slots[position] = slot
    in_order = len(batches) == 1 and batches[0].device == device and positions == list(range(count))
    return Plan(
        present=tuple(grad is not None for grad in grads),
        absent=tuple(parameters[i] for i in absent),
        batches=tuple(batches),
        device=device,
        order=None if in_order else torch.tensor(slots, dtype=torch.int64, device=device),
        zero=torch.zeros(1 if absent else 0, device=device),
        sharded=tuple(
            ShardedGroup(
                layout, None if len(members) == count else torch.tensor(members, device=device)
            )
            for layout, members in layouts.items()
        ),
    )


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _target(devices: Sequence[torch.device]) -> torch.device:
    accelerators = [device for device in devices if device.type != "cpu"]
    return (accelerators or [torch.device("cpu")])[0]
