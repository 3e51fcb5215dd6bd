"""Sums over the shards of tensors that are spread over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.measure._sharded import (
    Layout,
    ShardedGroup,
    is_dtensor,
    layout_of,
    local_part,
    sum_over_shards,
)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: the tensor itself, or its local shard."""
    return local_part(tensor) if is_dtensor(tensor) else tensor


class ShardReducer:
    """Adds up one number per tensor over the processes that hold its shards.

    Args:
        tensors: The tensors; plain ones are left as they are, and without any sharded one no
            collective is ever started.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        layouts: dict[Layout, list[int]] = {}
        for position, tensor in enumerate(tensors):
            if is_dtensor(tensor) and layout_of(tensor).mesh_dims:
                layouts.setdefault(layout_of(tensor), []).append(position)
        self._groups = tuple(
            ShardedGroup(
                layout, torch.tensor(positions, device=local_part(tensors[positions[0]]).device)
            )
            for layout, positions in layouts.items()
        )

    def sum(self, values_KP: Tensor) -> Tensor:
        """Sums over shards of ``K`` numbers for each of ``P`` tensors, in one collective a layout.

        Args:
            values_KP: (K, P) this process's part.
        """
        return sum_over_shards(values_KP, self._groups) if self._groups else values_KP
