"""Batches of all kinds, classes that occur in them, and when two are the same."""

from __future__ import annotations

import dataclasses
import math
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class Pair(NamedTuple):
    inputs: Any
    targets: Any


@dataclass(frozen=True)
class Sample:
    values: Any
    name: str = ""


@dataclass
class Grown:
    values: Any
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = 3
        self.beside = "not a field"


class Encoding(UserDict):  # type: ignore[type-arg]
    pass


DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
)
ARRAY_DTYPES = ("<f4", ">f8", "<i2", "|u1", "|b1", "<c16", "<u8", "<M8[s]", "<U3", "|S2")


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = torch.randint(0, 3, shape).to(draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["plain", "view", "expanded", "gradient", "parameter", "sparse"]))
    if kind == "view" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].transpose(0, -1)
    if kind == "expanded":
        return tensor.unsqueeze(0).expand(4, *tensor.shape)
    if tensor.dtype.is_floating_point and kind in ("gradient", "parameter"):
        return nn.Parameter(tensor) if kind == "parameter" else tensor.requires_grad_()
    return tensor.to_sparse() if kind == "sparse" and tensor.dim() else tensor


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    whole = np.arange(math.prod(shape)).reshape(shape)
    array = whole.astype(draw(st.sampled_from(ARRAY_DTYPES)))
    return array.flat[0] if array.size and draw(st.booleans()) else array.T


@st.composite
def packed(draw: st.DrawFn) -> PackedSequence:
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sequences = [torch.randn(length, 2) for length in lengths]
    return nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)


KEYS = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.none())
PLAIN = st.one_of(
    KEYS,
    st.floats(),
    st.complex_numbers(),
    st.binary(max_size=4),
    st.integers(-(10**40), 10**40),
    st.sampled_from([torch.float16, torch.device("cuda:1"), torch.Size([2, 3])]),
)


def _containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    many = st.lists(inside, max_size=3)
    return st.one_of(
        many,
        many.map(tuple),
        st.dictionaries(KEYS, inside, max_size=3),
        st.frozensets(KEYS, max_size=3),
        st.sets(st.text(max_size=2), max_size=3),
        st.builds(Pair, inside, inside),
        st.builds(Sample, inside, st.text(max_size=3)),
        st.builds(Grown, inside),
        st.dictionaries(st.text(max_size=3), inside, max_size=3).map(Encoding),
    )


BATCHES = st.recursive(st.one_of(PLAIN, tensors(), arrays(), packed()), _containers, max_leaves=8)


def assert_same(one: Any, other: Any, where: str = "batch") -> None:
    """Of the same type and with the same values, a NaN being itself."""
    assert type(one) is type(other), where
    if isinstance(other, Tensor):
        assert (one.dtype, one.shape, one.layout) == (other.dtype, other.shape, other.layout), where
        assert one.requires_grad == other.requires_grad, where
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(other, (np.ndarray, np.generic)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        np.testing.assert_array_equal(one, other)
    elif isinstance(other, PackedSequence):
        for name in PackedSequence._fields:
            assert_same(getattr(one, name), getattr(other, name), f"{where}.{name}")
    elif isinstance(other, (Mapping, UserDict)):
        assert [*map(repr, one)] == [*map(repr, other)], where
        for key in other:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(other, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif dataclasses.is_dataclass(other):
        assert_same(vars(one), vars(other), where)
    else:
        assert repr(one) == repr(other) or one == other, where
