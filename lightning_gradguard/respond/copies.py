"""Copies of tensors, and of whatever optimizers keep them in, that can be put back to the bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.measure.sharding import local_tensor


class TensorCopy:
    """A copy of a tensor in host memory.

    From CUDA it is on its way when the constructor returns: whoever reads it, or writes over it,
    waits for an event that was recorded after it.

    Args:
        tensor: What to copy; of a sharded one, the local shard.
        memory: An older copy whose memory is used again if it fits.

    Attributes:
        host: The copy.
    """

    host: Tensor

    def __init__(self, tensor: Tensor, memory: TensorCopy | None = None) -> None:
        local = local_tensor(tensor).detach()
        host = memory.host if memory is not None else None
        if host is None or not _same_form(host, local):
            host = _host_memory(local)
        host.copy_(local, non_blocking=local.is_cuda)
        self.host = host
        self._device = local.device
        self._sharding: tuple[Any, ...] | None = None
        if local_tensor(tensor) is not tensor:
            whole: Any = tensor
            self._sharding = (
                type(tensor).from_local,  # type: ignore[attr-defined]  # a DTensor
                whole.device_mesh,
                whole.placements,
                tensor.shape,
                tensor.stride(),
            )

    def put_back(self, present: object = None) -> Tensor:
        """The copied values: in ``present``, where that is a tensor of the form that they had.

        Otherwise a new tensor holds them.
        """
        if isinstance(present, Tensor):
            local = local_tensor(present).detach()
            if _same_form(local, self.host) and local.device == self._device:
                local.copy_(self.host)
                return present
        fresh = torch.empty_like(self.host, device=self._device, pin_memory=False)
        fresh.copy_(self.host)
        if self._sharding is None:
            return fresh
        from_local, mesh, placements, shape, stride = self._sharding
        whole: Tensor = from_local(
            fresh, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return whole


def copy_of(value: object, memory: object = None) -> object:
    """A copy of a value, in the memory of an older copy as far as that fits.

    Of dicts, lists and tuples, each entry by itself; anything else is copied as Python does.

    Example:
        >>> state = {"step": 3, "average": torch.ones(2), "factors": [torch.zeros(1)]}
        >>> kept = copy_of(state)
        >>> state["step"] = 4
        >>> average = state["average"].mul_(5.0)
        >>> put_back(kept, state)
        {'step': 3, 'average': tensor([1., 1.]), 'factors': [tensor([0.])]}
        >>> state["average"] is average
        True
    """
    if isinstance(value, Tensor):
        return TensorCopy(value, memory if isinstance(memory, TensorCopy) else None)
    if type(value) is dict:
        old = memory if isinstance(memory, dict) else {}
        return {key: copy_of(item, old.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        items: Any = value
        before: Any = memory if type(memory) is type(value) else ()
        padded = [*before, *[None] * len(items)]
        return type(items)(copy_of(i, m) for i, m in zip(items, padded, strict=False))
    return copy.deepcopy(value)


def put_back(kept: object, present: object) -> object:
    """What `copy_of` has copied; tensors, dicts and lists of ``present`` are kept and filled."""
    if isinstance(kept, TensorCopy):
        return kept.put_back(present)
    if type(kept) is dict:
        target = present if type(present) is dict else {}
        values = {key: put_back(item, target.get(key)) for key, item in kept.items()}
        target.clear()
        target.update(values)
        return target
    if type(kept) in (list, tuple):
        items: Any = kept
        before: Any = present if type(present) is type(kept) else ()
        padded = [*before, *[None] * len(items)]
        filled = [put_back(i, p) for i, p in zip(items, padded, strict=False)]
        if type(before) is list:
            before[:] = filled
            return before
        return type(items)(filled)
    return copy.deepcopy(kept)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in a nest of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def bytes_on_a_rank(tensor: Tensor) -> int:
    """Host memory for a copy; of a sharded tensor an even share, the same number on every rank."""
    size = tensor.numel() * tensor.element_size()
    if local_tensor(tensor) is tensor:
        return size
    sharded: Any = tensor
    shards: int = math.prod(
        sharded.device_mesh.size(dim)
        for dim, placement in enumerate(sharded.placements)
        if placement.is_shard()
    )
    return -(-size // shards)


@torch.no_grad()
def largest_elements(tensors: Iterable[Tensor]) -> Tensor | None:
    """(N,) the largest magnitude in each tensor that has any, on the device of the first.

    Squares of weights that are finite may not be, so no other norm would do. Integers are left out;
    ``None`` if nothing is left.
    """
    locals_ = [local_tensor(t).detach() for t in tensors]
    floating = [torch.view_as_real(t) if t.is_complex() else t for t in locals_]
    floating = [t for t in floating if t.is_floating_point() and t.numel() > 0]
    if not floating:
        return None
    largest = torch._foreach_norm(floating, math.inf)
    wide = any(n.dtype is torch.float64 for n in largest)
    dtype, device = torch.float64 if wide else torch.float32, floating[0].device
    return torch.stack([n.to(device, dtype) for n in largest])


def all_finite(tensors: Iterable[Tensor]) -> Tensor | None:
    """() whether every element is a number, on the device of the first; ``None`` if there is none.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
        tensor(False)
    """
    largest = largest_elements(tensors)
    return None if largest is None else largest.isfinite().all()


def is_writable(tensor: Tensor) -> bool:
    """Whether the tensor can be written to, as one cannot that repeats its elements.

    Nor does it have to be put back: nothing else can have written to it.
    """
    local = local_tensor(tensor)
    if local.layout is not torch.strided:
        return True
    pairs = zip(local.shape, local.stride(), strict=True)
    return not any(size > 1 and stride == 0 for size, stride in pairs)


def _same_form(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype and one.layout == other.layout
    return same and one.layout is torch.strided


def _host_memory(local: Tensor) -> Tensor:
    if local.layout is not torch.strided:
        return local.to("cpu", copy=True)
    return torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
