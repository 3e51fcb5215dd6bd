"""Sequences in all the forms that torch's recurrent modules take, and back.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``K`` layers times directions, ``H`` hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Input = Tensor | PackedSequence


@dataclass(frozen=True, eq=False)
class Layout:
    """In which form a batch came, so that the output can be returned in the same.

    Attributes:
        batch: How many sequences it has.
        batched: Whether it had a batch dimension.
        batch_first: Whether that came first.
        packed: The packed sequence that it came as.
    """

    batch: int
    batched: bool
    batch_first: bool
    packed: PackedSequence | None = None

    @property
    def batch_sizes(self) -> list[int] | None:
        """How many sequences are alive at each timestep, if packed."""
        return None if self.packed is None else self.packed.batch_sizes.tolist()

    def sorted(self, state_KBH: Tensor) -> Tensor:
        """A state of the caller in the order of the packed sequences."""
        order = None if self.packed is None else self.packed.sorted_indices
        return state_KBH if order is None else state_KBH.index_select(1, order)

    def state(self, state_KBH: Tensor) -> Tensor:
        """A state as the caller wants it."""
        order = None if self.packed is None else self.packed.unsorted_indices
        if order is not None:
            state_KBH = state_KBH.index_select(1, order)
        return state_KBH if self.batched else state_KBH.squeeze(1)

    def output(self, output: Tensor) -> Input:
        """``(T, B, H)`` or packed data as the caller wants it."""
        if self.packed is not None:
            return PackedSequence(
                output,
                self.packed.batch_sizes,
                self.packed.sorted_indices,
                self.packed.unsorted_indices,
            )
        if not self.batched:
            return output.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output


def read_input(
    name: str,
    input: Input,  # noqa: A002 - as torch's own modules call it
    input_size: int,
    weight: Tensor,
    *,
    batch_first: bool,
) -> tuple[Tensor, Layout]:
    """Check an input as torch's own modules do, with their messages.

    Args:
        name: Of the module's type.
        input: Tensor with or without batch dimension, or packed.
        input_size: What its last dimension must be.
        weight: Of the module, for its dtype.
        batch_first: Whether the batch dimension comes first.

    Returns:
        ``(T, B, I)``, or the data of a packed sequence, and the layout.

    Raises:
        RuntimeError: If the last dimension is not ``input_size``.
        ValueError: If there are too few or too many dimensions, or the dtype is another one.
    """
    packed: PackedSequence | None = None
    if isinstance(input, PackedSequence):
        packed = input
        x, batch, batched = input.data, int(input.batch_sizes[0]), True
    else:
        x = input
        if x.dim() not in (2, 3):
            raise ValueError(
                f"{name}: Expected input to be 2D or 3D, got {x.dim()}D tensor instead"
            )
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(1)
        elif batch_first:
            x = x.transpose(0, 1)
        batch = x.size(1)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    check_features(x, input_size)
    if packed is None and x.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return x, Layout(batch, batched, batch_first, packed)


def check_features(x: Tensor, input_size: int) -> None:
    """Raises RuntimeError, with torch's message, if the last dimension is not ``input_size``."""
    if x.size(-1) != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {input_size}, got {x.size(-1)}"
        )


def read_state(
    state: Tensor, shape: tuple[int, ...], layout: Layout, label: str = "hidden"
) -> Tensor:
    """Check a state that the caller gives, with torch's messages; returns ``(K, B, H)``.

    Args:
        state: ``(K, B, H)``, or ``(K, H)`` if there is no batch.
        shape: ``(K, B, H)``.
        layout: Of the input.
        label: What messages call it.

    Raises:
        RuntimeError: If the shape is another one.
    """
    alone = not layout.batched and layout.packed is None
    dims, form = (2, "unbatched") if alone else (3, "batched")
    if state.dim() != dims:
        names = "hx" if label == "hidden" else "hx and cx"
        raise RuntimeError(
            f"For {form} {dims}-D input, {names} should also be {dims}-D but got "
            f"{state.dim()}-D tensor of size {list(state.shape)}"
        )
    if alone:
        state = state.unsqueeze(1)
    if tuple(state.shape) != shape:
        raise RuntimeError(f"Expected {label} size {shape}, got {list(state.shape)}")
    return layout.sorted(state)
