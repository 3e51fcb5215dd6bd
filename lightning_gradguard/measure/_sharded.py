"""Gradients that are spread over several processes (``DTensor``: FSDP2, tensor parallelism).

Each process holds the norms of its own shards. Squares of norms add up over the shards of a tensor,
so one sum over the processes combines the norms of all tensors that are sharded in the same way.

``DTensor`` is recognized by what it carries instead of by its class: importing the class takes
longer than the rest of this package, and fails where torch was built without ``distributed``.

Shape suffixes: ``K`` numbers per parameter, ``P`` parameters, ``S`` parameters of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Layout(NamedTuple):
    """The mesh dimensions over which the squared norms of a tensor's local parts add up."""

    mesh: DeviceMesh
    mesh_dims: tuple[int, ...]


@dataclass(frozen=True)
class ShardedGroup:
    """Entries of a vector over parameters that are summed over processes together.

    Attributes:
        layout: How the tensors behind the entries are spread.
        positions: The entries, shape ``(S,)``; ``None`` when they are the whole vector.
    """

    layout: Layout
    positions: Tensor | None

    @cached_property
    def process_groups(self) -> tuple[Any, ...]:
        """The process groups to sum over, one for each sharded mesh dimension.

        It is one group for all of them where they span every process; a part of the processes has
        no group of its own, and making one is not for a measurement to do.
        """
        mesh, dims = self.layout
        groups = tuple(mesh.get_group(dim) for dim in dims)
        distributed = torch.distributed
        if (
            len(dims) == mesh.ndim > 1
            and mesh.size() == distributed.get_world_size()
            and {distributed.get_backend(group) for group in groups} == {distributed.get_backend()}
        ):
            return (distributed.group.WORLD,)
        return groups


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one process's view of a distributed tensor."""
    # A property that a subclass lacks is looked up in vain at 1 us for each ordinary tensor.
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def layout_of(tensor: Any) -> Layout:
    """Return the layout of what :func:`local_part` returns for this ``DTensor``."""
    if has_pending_sum(tensor):
        return Layout(tensor.device_mesh, ())
    dims = enumerate(tensor.placements)
    return Layout(tensor.device_mesh, tuple(d for d, place in dims if not place.is_replicate()))


def local_part(tensor: Any) -> Tensor:
    """Return the plain tensor that this process holds of a ``DTensor``.

    A ``Partial`` placement holds summands of the gradient, and their norms do not tell the norm of
    the sum: such a tensor is put together in full, at a collective of its own. Data and tensor
    parallel modules return gradients that are summed already, so this is rare.
    """
    local: Tensor = tensor.full_tensor() if has_pending_sum(tensor) else tensor.to_local()
    return local


def has_pending_sum(tensor: Any) -> bool:
    """Whether the processes hold summands of a ``DTensor``."""
    return any(placement.is_partial() for placement in tensor.placements)


def mesh_device(tensor: Any) -> torch.device:
    """Return the device from which this process communicates on the mesh of a ``DTensor``."""
    kind = tensor.device_mesh.device_type
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def sum_over_shards(values_KP: Tensor, groups: Sequence[ShardedGroup]) -> Tensor:
    """Add up numbers per tensor over the processes that hold its shards, without changing them.

    Args:
        values_KP: This process's part, shape ``(P,)`` or ``(K, P)``.
        groups: The entries that are sharded, in an order that is the same on every process. Each
            takes one collective, or one for each of its process groups.

    Returns:
        The sums in the shape of ``values_KP``; entries of no group stay as they are.
    """
    for group in groups:
        if group.positions is None:
            part_KS = values_KP.clone()
        else:
            part_KS = values_KP.index_select(-1, group.positions)
        for process_group in group.process_groups:
            torch.distributed.all_reduce(part_KS, group=process_group)
        if group.positions is None:
            values_KP = part_KS
        else:
            values_KP = values_KP.index_copy(-1, group.positions, part_KS)
    return values_KP


def combine_norms(values_P: Tensor, groups: Sequence[ShardedGroup]) -> Tensor:
    """Turn norms of local shards into norms of whole tensors, equal on every process of the mesh.

    Args:
        values_P: Norms of the local parts, shape ``(P,)``.
        groups: As for :func:`sum_over_shards`.
    """
    # In float64, as squares of float32 norms leave the range of float32.
    squares_P = values_P.to(torch.float64).square()
    return sum_over_shards(squares_P, groups).sqrt_().to(values_P.dtype)
