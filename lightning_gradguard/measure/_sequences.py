"""Sequences as recurrent modules take them, brought to one layout: time first, padded, in order.

Shape suffixes: ``T`` time, ``B`` batch, ``F`` features, ``K`` layers times directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Sequences = Tensor | PackedSequence


@dataclass(frozen=True, eq=False)
class Layout:
    """How a module's sequences are laid out, and the way to ``(T, B, F)`` and back.

    Attributes:
        timesteps: Length of the longest sequence.
        lengths_B: Length of each sequence, int64, on the CPU, in the caller's order.
        batched: Whether there is a batch axis.
        batch_first: Whether it comes before time.
        packed: The packed input, if it is packed.
    """

    timesteps: int
    lengths_B: Tensor
    batched: bool
    batch_first: bool
    packed: PackedSequence | None

    @property
    def ragged(self) -> bool:
        """Whether some sequences end before the longest one does."""
        return self.packed is not None

    def time_first(self, value: Sequences) -> Tensor:
        """Bring one tensor in the module's layout to ``(T, B, F)``, zero beyond each end."""
        if isinstance(value, PackedSequence):
            return pad_packed_sequence(value)[0]
        if not self.batched:
            return value.unsqueeze(1)
        return value.transpose(0, 1) if self.batch_first else value

    def states(self, value: Tensor) -> Tensor:
        """Bring states ``(K, F)`` or ``(K, B, F)`` to ``(K, B, F)``."""
        return value if self.batched else value.unsqueeze(1)

    def like_data(self, value_TBF: Tensor, width: int) -> Tensor:
        """New ones in the order in which the module itself keeps ``width`` features."""
        if self.packed is None:
            return value_TBF.new_ones((*value_TBF.shape[:2], width))
        return value_TBF.new_ones((self.packed.data.shape[0], width))

    def from_data(self, data: Tensor) -> Tensor:
        """Bring what :meth:`like_data` made to ``(T, B, F)``."""
        if self.packed is None:
            return data
        p = self.packed
        return pad_packed_sequence(
            PackedSequence(data, p.batch_sizes, p.sorted_indices, p.unsorted_indices)
        )[0]

    def alive(self, device: torch.device) -> Tensor:
        """Whether each sequence reaches each timestep."""
        times_T = torch.arange(self.timesteps, device=device)
        return times_T.unsqueeze(1) < self.lengths_B.to(device, non_blocking=True)

    def reverse(self, value_TBF: Tensor, *, shorter_by: int = 0) -> Tensor:
        """Turn each sequence around within its own length; its own inverse.

        Args:
            value_TBF: Any number of features, or ``(T, B)``.
            shorter_by: 1 for what belongs to the boundaries between timesteps.
        """
        if not self.ragged:
            return value_TBF.flip(0)
        device = value_TBF.device
        times_T1 = torch.arange(len(value_TBF), device=device).unsqueeze(1)
        lengths_B = self.lengths_B.to(device, non_blocking=True) - shorter_by
        order_TB = torch.where(times_T1 < lengths_B, lengths_B - 1 - times_T1, times_T1)
        shape = (*order_TB.shape, *[1] * (value_TBF.dim() - 2))
        return value_TBF.gather(0, order_TB.view(shape).expand_as(value_TBF))

    def add_at_ends(self, value_TBF: Tensor, ends_BF: Tensor) -> Tensor:
        """A copy of ``value_TBF`` with ``ends_BF`` added at the last step of each sequence.

        Any number of features, or ``(T, B)`` and ``(B,)``.
        """
        result = value_TBF.clone()
        if not self.ragged:
            result[-1] += ends_BF
            return result
        rows_B = torch.arange(len(self.lengths_B), device=result.device)
        ends_B = (self.lengths_B - 1).to(result.device, non_blocking=True)
        result[ends_B, rows_B] += ends_BF
        return result


def layout_of(sequences: Sequences, *, batch_first: bool) -> Layout:
    """The layout of a recurrent module's input.

    Args:
        sequences: ``(T, B, F)``, ``(B, T, F)`` if ``batch_first``, ``(T, F)``, or packed.
        batch_first: As the module was made.

    Raises:
        ValueError: If it is a tensor of another number of dimensions, or without any timestep.
    """
    if isinstance(sequences, PackedSequence):
        return _packed_layout(sequences)
    if sequences.dim() not in (2, 3):
        raise ValueError(
            f"input must have 2 dimensions (unbatched) or 3, got shape {tuple(sequences.shape)}"
        )
    batched = sequences.dim() == 3
    steps = sequences.shape[1 if batched and batch_first else 0]
    size = sequences.shape[0 if batch_first else 1] if batched else 1
    if steps == 0 or size == 0:
        raise ValueError(
            "input must have at least one timestep and one sequence, "
            f"got shape {tuple(sequences.shape)}"
        )
    lengths_B = torch.full((size,), steps, device="cpu")
    return Layout(steps, lengths_B, batched, batch_first, None)


def _packed_layout(packed: PackedSequence) -> Layout:
    # batch_sizes[t] sequences reach t, and they are sorted by length: read off each one's length.
    sizes_T = packed.batch_sizes
    rows_B = torch.arange(int(sizes_T[0]), device="cpu")
    lengths_B = (sizes_T.unsqueeze(1) > rows_B).sum(0)
    if packed.unsorted_indices is not None:
        lengths_B = lengths_B[packed.unsorted_indices.cpu()]
    return Layout(len(sizes_T), lengths_B, True, False, packed)
