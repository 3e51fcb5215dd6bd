"""Examples in memory, the orders they come in, and symbols as inputs.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import Dataset, Sampler

from lightning_gradguard._validation import check_type

Batch = tuple[Tensor, Tensor]

# A multiple of the six seeds that a task takes for itself, so that no epoch meets another's.
_BETWEEN_EPOCHS = 6_000_018


class Split(Dataset[Batch]):
    """The examples of one split, kept as whole tensors: an index alone decides its example.

    Args:
        inputs: One row per example, as small as they can be kept.
        targets: One row per example. Integers come out as ``int64``, as losses want them.
        encode: Makes what a model takes of rows of ``inputs``; it must treat every row alike.

    Example:
        >>> split = Split(torch.zeros(3, 5), torch.tensor([0, 1, 2], dtype=torch.int32))
        >>> len(split), split[2][1]
        (3, tensor(2))
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, encode: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._inputs, self._targets, self._encode = inputs, targets, encode

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Batch:
        (example,) = self.__getitems__([range(len(self))[index]])
        return example

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        # A loader asks for its whole batch here: one gather and one encoding instead of B of each.
        inputs, targets = self._rows(torch.tensor(indices))
        return list(zip(inputs.unbind(), targets.unbind(), strict=True))

    def batch(self) -> Batch:
        """All examples as one batch."""
        return self._rows(torch.arange(len(self)))

    def _rows(self, chosen_B: Tensor) -> Batch:
        inputs, targets = self._inputs[chosen_B], self._targets[chosen_B]
        if self._encode is not None:
            inputs = self._encode(inputs)
        return inputs, targets if targets.is_floating_point() else targets.long()


class Shuffled(Sampler[int]):
    """An order per epoch that follows from a seed and the number of the epoch alone.

    With a generator instead, as ``shuffle=True`` takes one, the second epoch would depend on the
    number of workers, on how far the first one came, and on whether the run was resumed.

    Args:
        size: Number of examples.
        seed: Of all orders.

    Example:
        >>> order = Shuffled(4, seed=0)
        >>> first, second = list(order), list(order)
        >>> order.set_epoch(1)  # as Lightning does before every epoch
        >>> list(order) == second
        True
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed, self._epoch = size, seed, 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + _BETWEEN_EPOCHS * self._epoch)
        self._epoch += 1
        return iter(torch.randperm(self._size, generator=generator).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Let the next order be that of an epoch, counted from 0."""
        self._epoch = epoch


def encoder(symbols: int, one_hot: bool) -> Callable[[Tensor], Tensor]:
    """What makes (B, T) symbols into inputs: (B, T, ``symbols``) floats, or (B, T) indices.

    Example:
        >>> encoder(3, one_hot=True)(torch.tensor([[2, 0]]))
        tensor([[[0., 0., 1.],
                 [1., 0., 0.]]])
    """
    check_type("one_hot", one_hot, bool, "True or False")
    return partial(_one_hot, symbols=symbols) if one_hot else Tensor.long


def _one_hot(indices_BT: Tensor, symbols: int) -> Tensor:
    return one_hot(indices_BT.long(), symbols).float()
