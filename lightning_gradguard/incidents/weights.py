"""The weights of a model: taken, told apart by their fingerprint, and put into another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.incidents.errors import IncidentError
from lightning_gradguard.incidents.structure import compact
from lightning_gradguard.measure import clean_name
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.record.plain_values import plain_values


@dataclass(frozen=True)
class Taken:
    """The weights as far as they can be taken.

    Attributes:
        tensors: Those of the state dict by their names, still where they are.
        why_not: Why there are none; empty if there are.
    """

    tensors: Mapping[str, Tensor]
    why_not: str = ""


def take(module: nn.Module) -> Taken:
    """Tensors of the state dict; nothing is copied.

    Example:
        >>> list(take(nn.Linear(2, 1)).tensors)
        ['weight', 'bias']
    """
    found = {
        clean_name(name): value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }
    if any(local_tensor(value) is not value for value in found.values()):
        return Taken({}, "they are spread over processes")
    if any(value.is_meta or nn.parameter.is_lazy(value) for value in found.values()):
        return Taken({}, "some of them have no values yet")
    return Taken(found)


def compacted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU."""
    return {name: compact(value) for name, value in tensors.items()}


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape, dtype, norm and SHA-256 of the bytes of each tensor.

    Example:
        >>> fingerprint({"weight": torch.ones(2, 2)})["weight"]["norm"]
        2.0
    """
    return {name: _fingerprint(value) for name, value in tensors.items()}


def _fingerprint(tensor: Tensor) -> dict[str, Any]:
    values = compact(tensor)
    if values.layout is not torch.strided:
        values = values.to_dense()
    flat = values.contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    real = values.is_floating_point() or values.is_complex()
    norm = torch.linalg.vector_norm(values if real else values.double()).item()
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "norm": plain_values(float(norm)),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def differing(module: nn.Module, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the tensors in which a module differs from a fingerprint."""
    own = fingerprint(take(module).tensors)
    names = [*known, *(name for name in own if name not in known)]
    return [name for name in names if _sum(own, name) != _sum(known, name)]


def _sum(prints: Mapping[str, Mapping[str, Any]], name: str) -> tuple[Any, ...]:
    one = prints.get(name, {})
    return one.get("sha256"), one.get("shape"), one.get("dtype")


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module these weights, in their own dtypes.

    Raises:
        IncidentError: If they are not those of such a module.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> put(layer, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
        >>> layer.weight.tolist()
        [[1.0, 1.0]]
    """
    own = {
        clean_name(name): name
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }
    if set(own) != set(tensors):
        lacking, beside = sorted(set(tensors) - set(own)), sorted(set(own) - set(tensors))
        said = [f"has no {_some(lacking)}"] * bool(lacking)
        said += [f"has {_some(beside)} beside them"] * bool(beside)
        raise IncidentError(
            "the weights of the incident are those of another model than "
            f"{type(module).__name__}, which {' and '.join(said)}"
        )
    _adopt_dtypes(module, tensors)
    state = {own[name]: value for name, value in tensors.items()}
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise IncidentError(
            f"the weights of the incident do not fit {type(module).__name__}: "
            + " ".join(str(error).split())
        ) from error


def _adopt_dtypes(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for named in (module.named_parameters, module.named_buffers):
        for name, value in named():
            stored = tensors.get(clean_name(name))
            if stored is not None and stored.dtype != value.dtype:
                value.data = value.data.to(stored.dtype)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
