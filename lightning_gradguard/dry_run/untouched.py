"""Leave everything as it was found: weights, gradients, attributes, a batch, random numbers."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.dry_run.keepers import keeper_of

# What cannot change; most elements of long lists are of these.
_FIXED = (bool, int, float, complex, str, bytes, type(None))


@contextlib.contextmanager
def untouched(*roots: object, outside: Iterable[object] = ()) -> Iterator[None]:
    """Put back, at the end of the block and after an exception, all that it has changed.

    That is: all random numbers, and of each root and all that is found in it the values of tensors
    and NumPy arrays, ``.grad`` (the same tensor as before; inside the block there is none),
    ``requires_grad``, the attributes of modules (train mode, hooks and metric states among them),
    the contents of lists, dicts, sets and deques, and the state of random number generators. Of a
    root of another kind all attributes are kept. Objects of other kinds that are found in a root
    are put back to their place, but not looked into.

    The copies need as much memory as the tensors: those of what trains are on its device, where
    training needs more for its optimizer; all other copies are on the CPU.

    Args:
        roots: Modules, batches, generators, ...
        outside: Objects that are not looked into, wherever they are found.

    Example:
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> with untouched(layer):
        ...     output = layer(torch.randn(8, 2))
        >>> layer.running_mean.tolist(), layer.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    with contextlib.ExitStack() as stack:
        for restore in _keep_random_states():
            stack.callback(restore)
        tensors: list[Tensor] = []
        for value, restore in _keep(roots, outside):
            stack.callback(restore)
            if isinstance(value, Tensor):
                tensors.append(value)
        for tensor in tensors:
            if tensor.is_leaf and tensor.grad is not None:
                tensor.grad = None
        yield


def _keep_random_states() -> Iterator[Callable[[], Any]]:
    yield partial(torch.set_rng_state, torch.get_rng_state())
    for accelerator in (torch.cuda, torch.xpu):
        if accelerator.is_initialized():
            yield partial(accelerator.set_rng_state_all, accelerator.get_rng_state_all())
    if torch.backends.mps.is_available():
        yield partial(torch.mps.set_rng_state, torch.mps.get_rng_state())
    yield partial(random.setstate, random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield partial(numpy.random.set_state, numpy.random.get_state())


def _keep(
    roots: Iterable[object], outside: Iterable[object]
) -> Iterator[tuple[object, Callable[[], Any]]]:
    # Holds on to the objects, so that no other gets their id.
    seen = {id(value): value for value in outside}
    waiting = [_content(root) for root in roots]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _FIXED) or id(value) in seen:
            continue
        seen[id(value)] = value
        keeper = keeper_of(value)
        if keeper is not None:
            restore, parts = keeper(value)
            yield value, restore
            waiting.extend(parts)


def _content(root: object) -> object:
    return vars(root) if keeper_of(root) is None and hasattr(root, "__dict__") else root
