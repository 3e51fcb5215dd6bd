"""The inverse of `structure.encode`: from JSON and tensors to what it was."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.incidents.class_paths import resolve
from lightning_gradguard.incidents.errors import IncidentError


def decode(
    structure: Any,
    tensors: Mapping[str, Tensor],
    *,
    place: Callable[[Tensor, str], Tensor] | None = None,
    main: ModuleType | None = None,
) -> Any:
    """Put together what `encode` took apart.

    Imports the modules in which classes of named tuples and dataclasses are defined.

    Args:
        structure: The skeleton.
        tensors: The tensors by name.
        place: Moves a tensor, told the type of the device it was on. Default: leaves it.
        main: Module that stands for ``__main__``.

    Raises:
        IncidentError: If something was not represented, or a class cannot be imported.

    Example:
        >>> decode({"kind": "tuple", "items": [1, {"kind": "float", "value": "inf"}]}, {})
        (1, inf)
    """
    return _Decoder(tensors, place or (lambda tensor, _: tensor), main).decode(structure)


class _Decoder:
    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        place: Callable[[Tensor, str], Tensor],
        main: ModuleType | None,
    ) -> None:
        self._tensors = tensors
        self._place = place
        self._main = main
        self._made: dict[str, Any] = {}  # what occurs twice is one object

    def decode(self, node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        build = _BUILDERS.get(str(node.get("kind")))
        if build is None:
            raise IncidentError(f"the incident has something of unknown kind {node.get('kind')!r}")
        return build(self, node)

    def items(self, node: dict[str, Any]) -> list[Any]:
        return [self.decode(item) for item in node["items"]]

    def pairs(self, node: dict[str, Any]) -> dict[Any, Any]:
        return {self.decode(key): self.decode(item) for key, item in node["items"]}

    def tensor(self, node: dict[str, Any]) -> Any:
        name = node["name"]
        if name not in self._made:
            value = self._place(self._tensors[name], node["device"])
            if node.get("parameter"):
                value = nn.Parameter(value, requires_grad=bool(node.get("requires_grad")))
            elif node.get("requires_grad"):
                value = value.detach().requires_grad_()
            self._made[name] = value
        return self._made[name]

    def array(self, node: dict[str, Any]) -> Any:
        import numpy as np

        name = node["name"]
        if name not in self._made:
            data = bytearray(self._tensors[name].numpy().tobytes())
            flat = np.frombuffer(data, dtype=np.dtype(node["dtype"]))
            array = flat.reshape(node["shape"])
            self._made[name] = array[()] if node.get("scalar") else array
        return self._made[name]

    def packed(self, node: dict[str, Any]) -> PackedSequence:
        names = ("data", "batch_sizes", "sorted_indices", "unsorted_indices")
        return PackedSequence(*(self.decode(node[name]) for name in names))

    def named_tuple(self, node: dict[str, Any]) -> Any:
        cls = self._class(node, lambda found: issubclass(found, tuple) and hasattr(found, "_make"))
        return cls._make(self.decode(item) for _, item in node["items"])

    def dataclass(self, node: dict[str, Any]) -> Any:
        # As it was, whatever its constructor would do with it now.
        value = object.__new__(self._class(node, dataclasses.is_dataclass))
        for name, item in node["items"]:
            object.__setattr__(value, name, self.decode(item))
        return value

    def user_dict(self, node: dict[str, Any]) -> Any:
        return self._class(node, lambda found: issubclass(found, UserDict))(self.pairs(node))

    def refused(self, node: dict[str, Any]) -> Any:
        raise IncidentError(
            f"the incident has of a {node['type']} only what it looked like: {node['repr']}"
        )

    def _class(self, node: dict[str, Any], fits: Callable[[type], bool]) -> Any:
        path = node["class"]
        try:
            found = resolve(path, self._main)
        except (ImportError, AttributeError) as error:
            said = f"{path}, which the batch needs, cannot be imported: {error}"
            raise IncidentError(said) from error
        if not isinstance(found, type) or not fits(found):
            raise IncidentError(f"{path}, which the batch needs, is no longer what it was")
        return found


_BUILDERS: dict[str, Callable[[_Decoder, dict[str, Any]], Any]] = {
    "int": lambda _, node: int(node["hex"], 16),
    "float": lambda _, node: float(node["value"]),
    "complex": lambda _, node: complex(*map(float, node["value"])),
    "bytes": lambda _, node: bytes.fromhex(node["value"]),
    "dtype": lambda _, node: getattr(torch, node["value"]),
    "device": lambda _, node: torch.device(node["value"]),
    "size": lambda _, node: torch.Size(node["value"]),
    "list": lambda decoder, node: decoder.items(node),
    "tuple": lambda decoder, node: tuple(decoder.items(node)),
    "set": lambda decoder, node: set(decoder.items(node)),
    "frozenset": lambda decoder, node: frozenset(decoder.items(node)),
    "dict": lambda decoder, node: decoder.pairs(node),
    "ordered_dict": lambda decoder, node: OrderedDict(decoder.pairs(node)),
    "user_dict": _Decoder.user_dict,
    "tensor": _Decoder.tensor,
    "array": _Decoder.array,
    "packed": _Decoder.packed,
    "named_tuple": _Decoder.named_tuple,
    "dataclass": _Decoder.dataclass,
    "object": _Decoder.refused,
}
