"""A batch as JSON and plain tensors, and back to what it was: without pickle.

What JSON knows stays as it is; everything else becomes an object with its ``"kind"``.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.incidents.class_paths import can_be_found, class_path

# Deeper than any batch, and well within what Python and JSON can follow.
_DEEPEST = 50
_LONGEST_REPR = 200
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
# Where a tensor stays on the host whatever the device, as the lengths of a packed sequence do.
ON_HOST = "host"


@dataclass
class Encoded:
    """A value taken apart.

    Attributes:
        structure: Its skeleton, ready for JSON.
        tensors: On the CPU, by the names that the skeleton has for them.
        problems: What could not be represented, in words; the value cannot be rebuilt then.
    """

    structure: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def encode(value: Any, name: str = "batch") -> Encoded:
    """Take apart a nest of containers, tensors, NumPy arrays and plain values.

    Understands None, numbers, strings, bytes; lists, tuples, dicts, sets; tensors,
    ``PackedSequence``, dtypes and devices; NumPy arrays and scalars; named tuples, dataclasses and
    subclasses of ``UserDict`` that are defined at the top level of a module.

    Args:
        value: The value.
        name: What it is called in problems and in the names of its tensors.

    Example:
        >>> encoded = encode({"pixels": torch.ones(2), "size": (3, None)})
        >>> encoded.structure["items"][1]
        ['size', {'kind': 'tuple', 'items': [3, None]}]
        >>> list(encoded.tensors), encoded.problems
        (['batch.0'], [])
    """
    encoder = _Encoder(name)
    encoder.encoded.structure = encoder.encode(value, (name,))
    return encoder.encoded


def compact(tensor: Tensor) -> Tensor:
    """The values on the CPU, without the rest of a memory that the tensor is a part of."""
    plain = tensor.detach().to("cpu")
    if plain.layout is not torch.strided:
        return plain
    plain = plain.resolve_conj().resolve_neg()
    whole = plain.numel() * plain.element_size()
    return plain.clone() if plain.untyped_storage().nbytes() > whole else plain


_Path = tuple[str, ...]


class _Encoder:
    def __init__(self, name: str) -> None:
        self._name = name
        self.encoded = Encoded()
        self._names: dict[int, tuple[str, Any]] = {}  # with the objects, so that ids stay theirs
        self._around: set[int] = set()

    def encode(self, value: Any, path: _Path) -> Any:
        if value is None or type(value) in (bool, str):
            return value
        for fits, code in _CODERS:
            if fits(value):
                return code(self, value, path)
        return self._refuse(value, path)

    def _next_name(self) -> str:
        return f"{self._name}.{len(self.encoded.tensors)}"

    def _refuse(self, value: Any, path: _Path, why: str = "") -> dict[str, Any]:
        kind = class_path(type(value))
        reason = f" {why}" if why else ""
        self.encoded.problems.append(f"{'.'.join(path)} is a {kind}{reason}")
        try:
            text = repr(value)[:_LONGEST_REPR]
        except Exception as error:  # noqa: BLE001 - of somebody else's object
            text = f"no repr: {type(error).__name__}"
        return {"kind": "object", "type": kind, "repr": text}

    def _inside(self, value: Any, path: _Path, code: Callable[[], Any]) -> Any:
        """Code a container that must not hold itself."""
        if id(value) in self._around or len(path) > _DEEPEST:
            return self._refuse(value, path, "that holds itself or is nested too deep")
        self._around.add(id(value))
        try:
            return code()
        finally:
            self._around.discard(id(value))

    def _many(self, items: Iterable[tuple[Any, Any]], path: _Path) -> list[Any]:
        return [self.encode(item, (*path, str(name))) for name, item in items]

    # -- one kind each ---------------------------------------------------------------------------

    def integer(self, value: int, path: _Path) -> Any:
        # Larger ones are no numbers to every reader of JSON.
        return value if value.bit_length() < 64 else {"kind": "int", "hex": hex(value)}

    def number(self, value: float, path: _Path) -> Any:
        return value if math.isfinite(value) else {"kind": "float", "value": str(value)}

    def text_like(self, kind: str, text: Callable[[Any], Any], value: Any, path: _Path) -> Any:
        return {"kind": kind, "value": text(value)}

    def tensor(self, value: Tensor, path: _Path, device: str = "") -> Any:
        known = self._names.get(id(value))
        if known is not None:
            return {"kind": "tensor", "name": known[0], "again": True}
        plain = type(value) in (Tensor, nn.Parameter)
        if not plain or (value.layout is not torch.strided and value.layout not in _SPARSE):
            return self._refuse(value, path, f"of layout {value.layout}")
        if value.is_quantized or value.is_nested or value.is_meta:
            return self._refuse(value, path, "that is quantized, nested or without values")
        name = self._next_name()
        self._names[id(value)] = (name, value)
        self.encoded.tensors[name] = compact(value)
        node: dict[str, Any] = {
            "kind": "tensor",
            "name": name,
            "device": device or value.device.type,
        }
        if value.requires_grad:
            node["requires_grad"] = True
        if isinstance(value, nn.Parameter):
            node["parameter"] = True
        return node

    def array(self, value: Any, path: _Path) -> Any:
        known = self._names.get(id(value))
        if known is not None:
            return {"kind": "array", "name": known[0], "again": True}
        if value.dtype.hasobject or value.dtype.fields is not None:
            return self._refuse(value, path, f"of dtype {value.dtype}")
        name = self._next_name()
        self._names[id(value)] = (name, value)
        # As bytes, since torch has not every dtype that NumPy has.
        data = bytearray(value.tobytes())
        bytes_of = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
        self.encoded.tensors[name] = bytes_of.to(torch.uint8)
        scalar = {} if type(value).__name__ in ("ndarray", "memmap") else {"scalar": True}
        shape = list(value.shape)
        return {"kind": "array", "name": name, "dtype": value.dtype.str, "shape": shape, **scalar}

    def packed(self, value: PackedSequence, path: _Path) -> Any:
        names = ("data", "sorted_indices", "unsorted_indices")
        parts = {name: self.encode(getattr(value, name), (*path, name)) for name in names}
        sizes = self.tensor(value.batch_sizes, (*path, "batch_sizes"), ON_HOST)
        return {"kind": "packed", "batch_sizes": sizes, **parts}

    def sequence(self, kind: str, value: Any, path: _Path) -> Any:
        items = sorted(value, key=repr) if kind in ("set", "frozenset") else value
        return self._inside(
            value, path, lambda: {"kind": kind, "items": self._many(enumerate(items), path)}
        )

    def mapping(self, kind: str, value: Any, path: _Path) -> Any:
        def code() -> dict[str, Any]:
            keys = self._many(((f"key {n}", key) for n, key in enumerate(value)), path)
            items = self._many(value.items(), path)
            return {"kind": kind, "items": [list(pair) for pair in zip(keys, items, strict=True)]}

        return self._inside(value, path, code)

    def of_class(
        self, kind: str, parts: Callable[[Any], Iterable[tuple[str, Any]]], value: Any, path: _Path
    ) -> Any:
        if not can_be_found(type(value)):
            return self._refuse(value, path, "that no other process can import")

        def code() -> dict[str, Any]:
            named = list(parts(value))
            coded = self._many(named, path)
            items = [[name, item] for (name, _), item in zip(named, coded, strict=True)]
            return {"kind": kind, "class": class_path(type(value)), "items": items}

        return self._inside(value, path, code)

    def user_dict(self, value: Any, path: _Path) -> Any:
        if not can_be_found(type(value)):
            return self._refuse(value, path, "that no other process can import")
        entries = self.mapping("user_dict", value.data, path)
        return {**entries, "class": class_path(type(value))}


# -- which kind a value is ------------------------------------------------------------------------


def exactly(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is of one of these types, and of no subclass."""
    return lambda value: type(value) in kinds


def is_array(value: Any) -> bool:
    """Whether a value is a NumPy array or scalar."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return False
    return type(value) in (numpy.ndarray, numpy.memmap) or isinstance(value, numpy.generic)


def is_named_tuple(value: Any) -> bool:
    """Whether a value is an instance of a named tuple."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def is_dataclass(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields_of(value: Any) -> Iterable[tuple[str, Any]]:
    """Fields and whatever else was set on the instance."""
    names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
    names += [name for name in getattr(value, "__dict__", {}) if name not in names]
    return [(name, getattr(value, name)) for name in names]


def _entries_of(value: Any) -> Iterable[tuple[str, Any]]:
    return zip(value._fields, value, strict=True)


def _text(kind: str, text: Callable[[Any], Any]) -> Callable[[_Encoder, Any, _Path], Any]:
    return lambda encoder, value, path: encoder.text_like(kind, text, value, path)


def _as(method: Callable[..., Any], *arguments: Any) -> Callable[[_Encoder, Any, _Path], Any]:
    return lambda encoder, value, path: method(encoder, *arguments, value, path)


_CODERS: tuple[tuple[Callable[[Any], bool], Callable[[_Encoder, Any, _Path], Any]], ...] = (
    (exactly(int), _Encoder.integer),
    (exactly(float), _Encoder.number),
    (exactly(complex), _text("complex", lambda value: [str(value.real), str(value.imag)])),
    (exactly(bytes), _text("bytes", bytes.hex)),
    (exactly(torch.dtype), _text("dtype", lambda value: str(value).removeprefix("torch."))),
    (exactly(torch.device), _text("device", str)),
    (lambda value: isinstance(value, Tensor), _Encoder.tensor),
    (exactly(PackedSequence), _Encoder.packed),
    (is_array, _Encoder.array),
    *(
        (exactly(kind), _as(_Encoder.sequence, kind.__name__))
        for kind in (list, tuple, set, frozenset)
    ),
    (exactly(torch.Size), _text("size", list)),
    (exactly(dict), _as(_Encoder.mapping, "dict")),
    (exactly(OrderedDict), _as(_Encoder.mapping, "ordered_dict")),
    (lambda value: isinstance(value, UserDict), _Encoder.user_dict),
    (is_named_tuple, _as(_Encoder.of_class, "named_tuple", _entries_of)),
    (is_dataclass, _as(_Encoder.of_class, "dataclass", _fields_of)),
)
