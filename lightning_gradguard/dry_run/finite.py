"""Whether tensors are finite, and at which timestep of which sample they are not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_gradguard.measure._taps import is_plain

Sequences = Tensor | PackedSequence

# Which of the two dimensions that are kept is time, and which one the samples.
_Axes = tuple[int | None, int | None]

# Their output is (samples, channels, time).
_CHANNELS_FIRST = (
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.BatchNorm1d,
    nn.InstanceNorm1d,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
)


def tensors_of(value: Any, *, objects: bool = True) -> Iterator[tuple[str, Sequences]]:
    """All tensors and packed sequences in a nest of containers, with their paths in it.

    Args:
        value: Tensors in tuples, lists, mappings, dataclasses and plain objects.
        objects: Whether to look into plain objects, too.

    Example:
        >>> nest = {"pixels": torch.ones(2), "rest": (3, [torch.ones(1)])}
        >>> [path for path, _ in tensors_of(nest)]
        ['pixels', 'rest.1.0']
    """
    yield from _walk(value, "", {}, _parts if objects else _items)


def _walk(
    value: Any,
    path: str,
    seen: dict[int, Any],
    parts: Callable[[Any], Iterator[tuple[Any, Any]]],
) -> Iterator[tuple[str, Sequences]]:
    if isinstance(value, (Tensor, PackedSequence)):
        yield path, value
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # held, so that no other gets its id
    for name, part in parts(value):
        yield from _walk(part, f"{path}.{name}" if path else str(name), seen, parts)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (Mapping, list, tuple)):
        yield from _items(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not callable(value):  # neither modules nor types
        yield from vars(value).items()


def is_finite(value: Sequences, *, mask: bool = False) -> bool:
    """Whether every element is a finite number (one host read, no copy).

    Args:
        value: Tensors of integers and of kinds that cannot be read here count as finite.
        mask: Whether minus infinity is all right, as in what is added to attention scores.

    Example:
        >>> is_finite(torch.tensor([1.0, -math.inf])), is_finite(torch.tensor([1, 2]))
        (False, True)
    """
    values = _values(value)
    if values is None or values.numel() == 0:
        return True
    low, high = torch.stack(values.aminmax()).tolist()  # a NaN makes both NaN
    return math.isfinite(high) and (math.isfinite(low) or (mask and low == -math.inf))


def _values(value: Sequences) -> Tensor | None:
    """The elements as real floating numbers, in the shape of the tensor if it is a dense one."""
    tensor = value.data if isinstance(value, PackedSequence) else value
    tensor = tensor.detach()
    if tensor.is_complex() and tensor.layout is torch.strided:
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not is_plain(tensor) or tensor.is_nested:
        return None
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return tensor.float() if tensor.element_size() == 1 else tensor


@dataclass(frozen=True, eq=False)
class Slices:
    """Where a tensor is not finite, along the two of its dimensions that can be time and samples.

    Attributes:
        bad: On the host, with as many dimensions as are kept: 0, 1 or 2.
        dims: Dimensions of the tensor.
        axes: Which dimension of ``bad`` is time, and which the samples; ``None`` if not known.
    """

    bad: Tensor
    dims: int
    axes: _Axes | None = None

    @classmethod
    def of(cls, value: Sequences, module: nn.Module | None = None, position: int = 0) -> Slices:
        """Those of a tensor.

        Args:
            value: The tensor.
            module: What it is an input or an output of.
            position: Which one of them.
        """
        values = _values(value)
        if isinstance(value, PackedSequence) and values is not None:
            return cls(_unpacked(value, _bad(values, (0,))), 3, (0, 1))
        tensor = value if isinstance(value, Tensor) else value.data
        if values is None or tensor.layout is not torch.strided:
            return cls(torch.ones((), dtype=torch.bool), 0)
        keep, axes = _known_axes(module, position, tensor.dim())
        return cls(_bad(values, keep), tensor.dim(), axes)

    def first(
        self,
        layouts: Mapping[tuple[int, ...], int],
        samples: Collection[int],
        *,
        last: bool = False,
    ) -> tuple[int | None, int | None]:
        """The first timestep that is not finite, and the first sample that is not, there.

        Args:
            layouts: Axis of time (0 or 1) of tensors with these first two sizes.
            samples: How many there may be; what has another size along that axis is not one.
            last: Take the last timestep in place of the first.
        """
        time, batch = self._axes(layouts)
        bad_TB = self._by_time(time, batch)
        rows, columns = bad_TB.nonzero(as_tuple=True)
        if not len(rows):
            return None, None
        row = int(rows[-1] if last else rows[0])
        column = int(columns[rows == row][0])
        known = batch is not None and (not samples or bad_TB.shape[1] in samples)
        return (row if time is not None else None), (column if known else None)

    def _axes(self, layouts: Mapping[tuple[int, ...], int]) -> _Axes:
        if self.axes is not None:
            return self.axes
        if self.dims >= 3:
            time = layouts.get(tuple(self.bad.shape), 1 if self.dims == 3 else None)
            if time is not None:
                return time, 1 - time
        return None, 0 if self.dims else None

    def _by_time(self, time: int | None, batch: int | None) -> Tensor:
        """(T, B); one of each where there is none."""
        bad = self.bad
        for axis in range(bad.dim() - 1, -1, -1):
            if axis not in (time, batch):
                bad = bad.any(axis)
        if time is not None and batch is not None:
            return bad if time < batch else bad.T
        return bad.reshape(-1, 1) if time is not None else bad.reshape(1, -1)


def _bad(values: Tensor, keep: tuple[int, ...]) -> Tensor:
    others = [axis for axis in range(values.dim()) if axis not in keep]
    if others and values.numel():
        finite = values.amin(others).isfinite() & values.amax(others).isfinite()
    else:
        finite = values.isfinite().all(others) if others else values.isfinite()
    return finite.logical_not().cpu()


def _unpacked(packed: PackedSequence, bad_N: Tensor) -> Tensor:
    order = (packed.sorted_indices, packed.unsorted_indices)
    on_host = (None if index is None else index.cpu() for index in order)
    rows = PackedSequence(bad_N.float().unsqueeze(1), packed.batch_sizes, *on_host)
    return pad_packed_sequence(rows)[0].squeeze(-1) > 0


def _known_axes(
    module: nn.Module | None, position: int, dims: int
) -> tuple[tuple[int, ...], _Axes | None]:
    """The dimensions to keep, and what they are if the module says so."""
    first_two = tuple(range(min(dims, 2)))
    batch_first = getattr(module, "batch_first", None)
    if isinstance(module, nn.RNNBase) and position > 0:  # states: (layers, samples, units)
        return first_two, (None, 1 if dims == 3 else None)
    if isinstance(module, nn.RNNBase) and dims == 2:
        return (0,), (0, None)
    if isinstance(module, nn.RNNCellBase):
        return first_two, (None, 0 if dims == 2 else None)
    if isinstance(module, _CHANNELS_FIRST) and dims == 3:
        return (0, 2), (1, 0)
    if isinstance(batch_first, bool) and position == 0 and dims == 3:
        return first_two, (1, 0) if batch_first else (0, 1)
    return first_two, None
