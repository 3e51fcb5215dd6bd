"""The random numbers that come next, of all generators that a training step may ask."""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RandomState:
    """States of the global generators.

    Attributes:
        cpu: Torch's on the CPU.
        cuda: Torch's on the CUDA device of the model, if it is on one.
        python: That of ``random``.
        numpy: NumPy's, if NumPy is in use.
    """

    cpu: Tensor
    cuda: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """As they are, for a model on ``device``; nothing waits for the device."""
        on_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), on_cuda, _python.state(), _numpy.state())

    def set(self, device: torch.device) -> None:
        """Let the same numbers come next."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def to_dict(self) -> dict[str, Any]:
        """Tensors, arrays and plain values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RandomState:
        """The inverse of :meth:`to_dict`."""
        return cls(**values)


@contextlib.contextmanager
def random_numbers_from(state: RandomState, device: torch.device) -> Iterator[None]:
    """Let the numbers of ``state`` come inside the block, and afterwards those that were next."""
    before = RandomState.now(device)
    state.set(device)
    try:
        yield
    finally:
        before.set(device)


class _PythonState:
    """Reads the state of ``random``, which takes 10 µs, again only if it has changed."""

    def __init__(self) -> None:
        self._last: Any = None
        self._memory: tuple[bytes, Any] | None = None

    def state(self) -> Any:
        generator: Any = getattr(random.getstate, "__self__", None)
        memory = self._read(generator)
        if memory is None or memory != self._memory:
            self._last, self._memory = random.getstate(), memory
        return self._last

    def _read(self, generator: Any) -> tuple[bytes, Any] | None:
        """All that the generator consists of; ``None`` where its memory is not known."""
        kind: type = random.Random
        if sys.implementation.name != "cpython" or type(generator) is not kind:
            return None
        # Between what every object has, its count of references among it, and what is Python's.
        base, head = kind.__mro__[1], object.__basicsize__
        content = ctypes.string_at(id(generator) + head, base.__basicsize__ - head)
        return content, getattr(generator, "gauss_next", None)  # a normal number in store


class _NumpyState:
    """Reads NumPy's global state, which takes 35 µs, again only if it has changed."""

    # Of the Mersenne twister: 624 words and a position.
    _BYTES = 4 * 625

    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None
        self._memory = b""

    def state(self) -> dict[str, Any] | None:
        numpy: Any = sys.modules.get("numpy")
        if numpy is None:
            return None
        memory = self._read(numpy)
        if self._last is None or not memory or memory != self._memory:
            self._last, self._memory = numpy.random.get_state(legacy=False), memory
        return self._last

    def _read(self, numpy: Any) -> bytes:
        """The memory of the generator; empty where it is not known."""
        get = getattr(numpy.random, "get_bit_generator", None)  # from NumPy 1.24 on
        generator: Any = get() if get is not None else None
        drawer: Any = getattr(numpy.random.get_state, "__self__", None)
        kind: type = numpy.random.RandomState
        if (
            sys.implementation.name != "cpython"
            or type(generator) is not numpy.random.MT19937
            or type(drawer) is not kind
        ):
            return b""
        head = object.__basicsize__
        # A normal number in store is no part of the generator, but of what draws from it.
        store = ctypes.string_at(id(drawer) + head, kind.__basicsize__ - head)
        return ctypes.string_at(generator.ctypes.state_address, self._BYTES) + store


_numpy = _NumpyState()
_python = _PythonState()
