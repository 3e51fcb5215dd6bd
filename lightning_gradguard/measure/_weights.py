"""The parameters of a model as an inspection lists them.

Shape suffixes: ``P`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.measure._layers import clean_name
from lightning_gradguard.measure._plan import norm_each
from lightning_gradguard.measure._usage import UsageWatch, is_torch_layer
from lightning_gradguard.measure.sharding import local_tensor


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter.

    Attributes:
        name: In the model, without what wrappers add.
        parameter: The tensor.
        group: Of the optimizer that is watched; ``None`` if it does not update it.
        elsewhere: Whether another optimizer of the run does.
        row_dim: Dimension of its rows, the output units; ``None`` if it has none.
        elements: Number of elements, 0 while it has no shape yet.
        dims: Number of dimensions.
    """

    name: str
    parameter: Tensor
    group: Mapping[str, Any] | None
    elsewhere: bool
    row_dim: int | None
    elements: int
    dims: int
    lazy: bool

    @property
    def is_stale(self) -> bool:
        """Whether it had no shape when this was made, and has one now."""
        return self.lazy and not nn.parameter.is_lazy(self.parameter)


def weights_of(
    model: nn.Module, optimizer: Optimizer, elsewhere: Collection[Tensor], usage: UsageWatch
) -> list[Weight]:
    """All parameters of ``model``, in the order of their registration."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    others = {id(parameter) for parameter in elsewhere}
    weights = []
    for name, parameter in model.named_parameters():
        lazy = nn.parameter.is_lazy(parameter)
        weights.append(
            Weight(
                clean_name(name),
                parameter,
                None if lazy else groups.get(id(parameter)),
                id(parameter) in others,
                None if lazy else _row_dim(parameter, usage.owners(parameter)),
                0 if lazy else parameter.numel(),
                0 if lazy else parameter.dim(),
                lazy,
            )
        )
    return weights


def _row_dim(parameter: Tensor, owners: Sequence[nn.Module]) -> int | None:
    """Of weights of layers; a parameter of a module with parts may mean anything."""
    if parameter.dim() < 2 or any(isinstance(o, nn.Embedding | nn.EmbeddingBag) for o in owners):
        return None
    if not all(is_torch_layer(o) or next(o.children(), None) is None for o in owners):
        return None
    dim = 0
    for owner in owners:
        if isinstance(owner, nn.modules.conv._ConvTransposeNd):  # noqa: SLF001 - no public name
            if owner.groups > 1:
                return None
            dim = 1
    return dim if parameter.shape[dim] > 1 else None


def local_values(parameter: Tensor) -> Tensor:
    """This process's part of a parameter, as real numbers."""
    part = local_tensor(parameter).detach()
    return torch.view_as_real(part.resolve_conj()) if part.is_complex() else part


def weight_norms(weights: Sequence[Weight], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(P,) norms of the values; of sharded tensors as if all shards were like this one."""
    parts = [local_values(weight.parameter) for weight in weights]
    norms_P = norms_of(parts, device, dtype)
    sharded = any(
        part.numel() < weight.elements for part, weight in zip(parts, weights, strict=True)
    )
    if not sharded:
        return norms_P
    sizes = zip(norms_P.unbind(), parts, weights, strict=True)
    return torch.stack([norm * _whole(part, weight) for norm, part, weight in sizes])


def _whole(part: Tensor, weight: Weight) -> float:
    if part.numel() >= weight.elements:
        return 1.0
    return math.sqrt(weight.elements / part.numel()) if part.numel() else math.nan


def norms_of(tensors: Sequence[Tensor | None], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(P,) norms of dense real tensors; NaN where there is none."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
            groups.setdefault((tensor.device, wide), []).append(i)
    norms = [torch.full((), math.nan, device=device, dtype=dtype)] * len(tensors)
    for (_, wide), members in groups.items():
        found_P = norm_each([t for i in members if (t := tensors[i]) is not None], wide)
        found_P = found_P.to(device, dtype, non_blocking=True)
        for i, norm in zip(members, found_P.unbind(), strict=True):
            norms[i] = norm
    return torch.stack(norms) if norms else torch.zeros(0, device=device, dtype=dtype)
