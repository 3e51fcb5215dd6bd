"""How the sequences of one call of a recurrent module are laid out, without reading a tensor.

Packed sequences stay in the order in which they are packed, by length: the caller's order would be
known to the device only.

Shape suffixes: ``T`` time, ``B`` batch, ``K`` layers times directions, ``N`` rows of packed data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Sequences = Tensor | PackedSequence

# Of longer sequences fewer are kept: 8 MB of norms.
_MOST_NORMS = 2**20


@dataclass(eq=False)
class CallShape:
    """Timesteps and sequences of one call.

    Attributes:
        timesteps: Length of the longest sequence.
        sequences: Number of sequences.
        batch_dim: Of tensors with a feature dimension; ``None`` if packed or unbatched.
        packed: Order and sizes of a packed input, in place of its data.
    """

    timesteps: int
    sequences: int
    batch_dim: int | None
    packed: PackedSequence | None

    @classmethod
    def of(cls, value: Sequences, *, batch_first: bool) -> CallShape | None:
        """The shape of a module's input, or ``None`` if the module will refuse it."""
        if isinstance(value, PackedSequence):
            sizes_T = value.batch_sizes  # always on the host
            sizes = PackedSequence(
                sizes_T, value.batch_sizes, value.sorted_indices, value.unsorted_indices
            )
            return cls(len(sizes_T), int(sizes_T[0]) if len(sizes_T) else 0, None, sizes)
        if value.dim() == 2:
            return cls(value.shape[0], 1, None, None)
        if value.dim() != 3:
            return None
        batch_dim = 0 if batch_first else 1
        return cls(value.shape[1 - batch_dim], value.shape[batch_dim], batch_dim, None)

    @property
    def lengths(self) -> Tensor | None:
        """Length of each packed sequence, on the host."""
        if self.packed is None:
            return None
        rows_B = torch.arange(self.sequences, device="cpu")  # as batch_sizes are
        return (self.packed.batch_sizes.unsqueeze(1) > rows_B).sum(0)

    def per_step(self, norms: Tensor) -> Tensor:
        """(T, B) of what has a number per timestep and sequence in the layout of the data."""
        if self.packed is not None:
            rows = PackedSequence(norms.unsqueeze(-1), self.packed.batch_sizes)
            return pad_packed_sequence(rows)[0].squeeze(-1)
        if self.batch_dim is None:
            return norms.unsqueeze(1)
        return norms.T if self.batch_dim == 0 else norms

    def per_sequence(self, norms: Tensor) -> Tensor:
        """(K, B) of what has a number per layer and, if batched, sequence of the caller's.

        The sequences are those that :meth:`thinned` leaves.
        """
        if norms.dim() == 1:
            return norms.unsqueeze(1)
        if self.packed is not None and self.packed.sorted_indices is not None:
            return norms.index_select(1, self.packed.sorted_indices)
        return norms[:, :: self._thinning]

    def thinned(self, norms: Tensor) -> Tensor:
        """Norms of so many of the sequences that they stay small, in the layout of the data."""
        stride = self._thinning
        if stride == 1:
            return norms
        return (norms[::stride] if self.batch_dim == 0 else norms[:, ::stride]).clone()

    @property
    def _thinning(self) -> int:
        if self.batch_dim is None:
            return 1
        return max(1, -(-self.timesteps * self.sequences // _MOST_NORMS))

    def every(self, stride: int) -> Rows:
        """Every ``stride``-th sequence."""
        return Rows(self, stride)


class Rows:
    """Some of the sequences of a call, copied out of its tensors.

    Args:
        shape: Of the call.
        stride: One sequence in so many is taken.
    """

    def __init__(self, shape: CallShape, stride: int) -> None:
        self._shape = shape
        self._stride = stride
        self._index_N: Tensor | None = None
        self._sizes_T: Tensor | None = None
        if shape.packed is not None and stride > 1:
            sizes_T = shape.packed.batch_sizes
            starts_T = sizes_T.cumsum(0) - sizes_T
            rows_N = torch.arange(int(sizes_T.sum()), device="cpu")  # as batch_sizes are
            places_N = rows_N - starts_T.repeat_interleave(sizes_T)
            self._index_N = (places_N % stride == 0).nonzero().squeeze(1)
            self._sizes_T = sizes_T.add(stride - 1).div(stride, rounding_mode="floor")

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return -(-self._shape.sequences // self._stride)

    def data(self, value: Tensor) -> Tensor:
        """A copy of the rows of an input, an output or the gradient of one."""
        value = value.detach()
        if self._index_N is not None:
            return value.index_select(0, self._index_N.to(value.device, non_blocking=True))
        if self._shape.batch_dim == 0:
            value = value[:: self._stride]
        elif self._shape.batch_dim == 1:
            value = value[:, :: self._stride]
        return value.clone(memory_format=torch.contiguous_format)

    def states(self, value: Tensor) -> Tensor:
        """A copy of the rows of a state or the gradient of one."""
        value = value.detach()
        packed = self._shape.packed
        if value.dim() == 3 and self._stride > 1:
            if packed is None or packed.sorted_indices is None:
                value = value[:, :: self._stride]
            else:
                return value.index_select(1, packed.sorted_indices[:: self._stride])
        return value.clone(memory_format=torch.contiguous_format)

    def sequence(self, data: Tensor) -> Sequences:
        """What :meth:`data` returned, packed again if it was."""
        packed = self._shape.packed
        if packed is None:
            return data
        if self._sizes_T is not None:
            return PackedSequence(data, self._sizes_T)
        return PackedSequence(
            data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
