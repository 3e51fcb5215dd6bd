"""Truncated backpropagation through time, which Lightning 2 leaves to its users.

Cut a batch into chunks along time, carry the state from one to the next, and cut its graph there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

from lightning_gradguard._validation import check_number, check_type

State = TypeVar("State")


def bptt_chunks(
    batch: Tensor | Sequence[Tensor], length: int, time_axis: int | Sequence[int | None] = 1
) -> Iterator[Any]:
    """Cut a batch along time into chunks of ``length`` steps; the last may be shorter.

    Chunks are views, no copies. Gradients reach back one chunk if the state is carried from chunk
    to chunk through `detach_state`, and ``length`` steps at most: memory no longer grows with the
    sequence, and nothing that has to be remembered for longer can be learned through the gradient
    alone.

    Args:
        batch: A tensor, or a tuple or list of tensors.
        length: Steps per chunk.
        time_axis: The axis of time. For tensors that differ in it one entry each, ``None`` for one
            that has no time and is handed over whole with every chunk, as a label.

    Yields:
        Chunks: a tensor, or a tuple of tensors.

    Raises:
        TypeError: If ``batch`` holds something else, or an argument is of the wrong type.
        ValueError: If an axis is missing or the tensors differ in their steps.

    Example:
        In a `LightningModule` that sets ``self.automatic_optimization = False``, its
        ``training_step`` takes an optimizer step per chunk in the same way as this loop:

        >>> import torch
        >>> from lightning_gradguard.tasks import CopyMemory, bptt_chunks, detach_state
        >>> task = CopyMemory(delay=80)
        >>> rnn, head = torch.nn.GRU(10, 16, batch_first=True), torch.nn.Linear(16, 9)
        >>> optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()])
        >>> state = None
        >>> for inputs, targets in bptt_chunks(next(iter(task.train_dataloader())), length=25):
        ...     outputs, state = rnn(inputs, detach_state(state))
        ...     optimizer.zero_grad()
        ...     task.loss(head(outputs), targets).backward()
        ...     optimizer.step()
        >>> state.shape
        torch.Size([1, 64, 16])
    """
    check_number("length", length, at_least=1, integer=True)
    tensors = [batch] if isinstance(batch, Tensor) else list(batch)
    for tensor in tensors:
        check_type("batch", tensor, Tensor, "a tensor or a tuple of tensors")
    axes = _axes(time_axis, len(tensors))
    steps = _steps(tensors, axes)

    def chunks() -> Iterator[Any]:
        for start in range(0, steps, length):
            size = min(length, steps - start)
            chunk = tuple(
                tensor if axis is None else tensor.narrow(axis, start, size)
                for tensor, axis in zip(tensors, axes, strict=True)
            )
            yield chunk[0] if isinstance(batch, Tensor) else chunk

    return chunks()  # so that bad arguments are reported here, and not by the first chunk


def _axes(time_axis: int | Sequence[int | None], tensors: int) -> list[int | None]:
    if isinstance(time_axis, int):
        return [time_axis] * tensors
    axes = list(time_axis)
    if len(axes) != tensors or all(axis is None for axis in axes):
        raise ValueError(
            "time_axis must be one axis, or one for each tensor of the batch, not all None: "
            f"got {time_axis!r} for {tensors} tensors"
        )
    return axes


def _steps(tensors: list[Tensor], axes: list[int | None]) -> int:
    found = set()
    for tensor, axis in zip(tensors, axes, strict=True):
        if axis is None:
            continue
        if not -tensor.dim() <= axis < tensor.dim():
            raise ValueError(
                f"time_axis must be an axis of every tensor, or None for one without time, got "
                f"{axis} for a tensor of shape {tuple(tensor.shape)}"
            )
        found.add(tensor.shape[axis])
    if len(found) != 1:
        raise ValueError(
            f"batch must have the same number of steps in every tensor, got {sorted(found)}"
        )
    return found.pop()


def detach_state(state: State) -> State:
    """Cut the graph of a recurrent state, of any nesting of tuples, lists and dicts of tensors.

    Values and structure stay, and named tuples and states with a ``detach`` of their own stay what
    they are. ``None``, the state before the first step, stays ``None``, so that a loop over chunks
    needs no special case.

    Args:
        state: A tensor, a nesting of tensors, or ``None``.

    Returns:
        The same with every tensor detached; storage is shared.

    Raises:
        TypeError: If ``state`` holds anything else.

    Example:
        >>> import torch
        >>> lstm = torch.nn.LSTM(3, 4)
        >>> _, state = lstm(torch.randn(5, 2, 3))
        >>> [tensor.requires_grad for tensor in state]
        [True, True]
        >>> [tensor.requires_grad for tensor in detach_state(state)]
        [False, False]
    """
    return cast("State", _detached(state))


def _detached(state: object) -> object:
    if state is None:
        return None
    if isinstance(state, dict):
        return {key: _detached(value) for key, value in state.items()}
    if isinstance(state, Tensor) or hasattr(state, "detach"):  # as that of a SkipLSTM
        return state.detach()
    if isinstance(state, (tuple, list)):
        parts = [_detached(value) for value in state]
        kind: Callable[..., object] = type(state)
        return kind(*parts) if hasattr(state, "_fields") else kind(parts)
    raise TypeError(f"state must be tensors in tuples, lists or dicts, or None, got {state!r}")
