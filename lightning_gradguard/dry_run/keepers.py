"""How each kind of object is kept as it is and put back later."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

# Puts one object back as it was, and what it holds, to be kept in its turn.
Kept = tuple[Callable[[], Any], Iterable[Any]]


def keeper_of(value: object) -> Callable[[Any], Kept] | None:
    """What keeps objects of the kind of ``value``; ``None`` for a kind that is not looked into."""
    for kind, keeper in _KEEPERS:
        if isinstance(value, kind):
            return keeper
    if isinstance(value, _numpy_types("ndarray")):
        return _keep_array
    if isinstance(value, _numpy_types("random", "Generator")):
        return _keep_numpy_generator
    if isinstance(value, _numpy_types("random", "RandomState")):
        return _keep_random_state
    return None


def is_generator(value: object) -> bool:
    """Whether ``value`` is a random number generator of torch, Python or NumPy."""
    numpy = (*_numpy_types("random", "Generator"), *_numpy_types("random", "RandomState"))
    return isinstance(value, (torch.Generator, Random, *numpy))


def _numpy_types(*path: str) -> tuple[type, ...]:
    """The type of that name, if NumPy is in use at all."""
    found: Any = sys.modules.get("numpy")
    if found is None:
        return ()
    for name in path:
        found = getattr(found, name)
    return (found,)


def _nothing() -> None:
    """Put nothing back."""


def _keep_module(module: nn.Module) -> Kept:
    training = module.training

    def restore() -> None:
        if module.training != training:  # TorchScript has it in no dict
            module.training = training

    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return restore, (vars(module), *own, *module.children())


def _keep_tensor(tensor: Tensor) -> Kept:
    # The same memory with a version of its own: graphs that wait for their backward stay valid.
    memory = tensor.data
    fixed = any(step == 0 and size > 1 for size, step in _strides(memory))  # torch writes no such
    values = None if fixed else _copy(tensor)
    leaf, requires_grad = tensor.is_leaf, tensor.requires_grad
    grad = tensor.grad if leaf else None

    def restore() -> None:
        if tensor.layout is torch.strided and not _same_memory(tensor, memory):
            tensor.data = memory
        if values is not None:
            memory.copy_(values)
        if leaf:
            if not tensor.is_leaf:
                tensor.detach_()
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad

    return restore, ()


def _copy(tensor: Tensor) -> Tensor:
    if tensor.requires_grad or tensor.is_cpu:
        return tensor.data.clone()
    return tensor.data.to("cpu", copy=True)


def _strides(tensor: Tensor) -> Iterable[tuple[int, int]]:
    strided = tensor.layout is torch.strided
    return zip(tensor.shape, tensor.stride(), strict=True) if strided else ()


def _same_memory(tensor: Tensor, other: Tensor) -> bool:
    return (
        tensor.data_ptr() == other.data_ptr()
        and tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
    )


def _keep_dict(values: dict[Any, Any]) -> Kept:
    kept = list(values.items())

    def restore() -> None:
        same = len(values) == len(kept) and all(
            name is key and value is other
            for (name, value), (key, other) in zip(values.items(), kept, strict=True)
        )
        if not same:
            values.clear()
            values.update(dict(kept))  # a Counter would count pairs

    return restore, [value for _, value in kept]


def _keep_list(values: list[Any]) -> Kept:
    kept = list(values)

    def restore() -> None:
        values[:] = kept

    return restore, kept


def _keep_set(values: set[Any]) -> Kept:
    kept = list(values)

    def restore() -> None:
        values.clear()
        values.update(kept)

    return restore, kept


def _keep_deque(values: deque[Any]) -> Kept:
    kept = list(values)

    def restore() -> None:
        values.clear()
        values.extend(kept)

    return restore, kept


def _keep_tuple(values: tuple[Any, ...]) -> Kept:
    return _nothing, values


def _keep_torch_generator(generator: torch.Generator) -> Kept:
    return partial(generator.set_state, generator.get_state()), ()


def _keep_python_generator(generator: Random) -> Kept:
    return partial(generator.setstate, generator.getstate()), ()


def _keep_numpy_generator(generator: Any) -> Kept:
    bits = generator.bit_generator
    return partial(setattr, bits, "state", bits.state), ()


def _keep_random_state(generator: Any) -> Kept:
    return partial(generator.set_state, generator.get_state()), ()


def _keep_array(array: Any) -> Kept:
    if not array.flags.writeable or isinstance(array, _numpy_types("memmap")):
        return _nothing, ()  # a memory map may be larger than the memory
    return partial(array.__setitem__, ..., array.copy()), ()


_KEEPERS: tuple[tuple[type, Callable[[Any], Kept]], ...] = (
    (nn.Module, _keep_module),
    (Tensor, _keep_tensor),
    (dict, _keep_dict),
    (list, _keep_list),
    (tuple, _keep_tuple),
    (set, _keep_set),
    (deque, _keep_deque),
    (torch.Generator, _keep_torch_generator),
    (Random, _keep_python_generator),
)
