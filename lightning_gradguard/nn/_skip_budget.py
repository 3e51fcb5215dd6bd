"""What the updates of a Skip RNN cost, and how many of them it makes.

Shape suffixes: ``T`` time, ``B`` batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.nn._sequences import Input

Gates = Tensor | PackedSequence | tuple[Tensor | PackedSequence, ...]
Lengths = Tensor | Sequence[int]


def skip_budget_loss(
    gates: Gates, cost: float, lengths: Lengths | None = None, *, batch_first: bool = False
) -> Tensor:
    """``cost · Σ_t u_t``, the mean over the batch: to be added to the loss of the task.

    Campos et al. 2018: every update costs the same. The gradient is straight-through: each
    ũ_t gets ``cost / B``. The cost to take depends on the scale of the task's loss; the paper takes
    1e-5 for a mean squared error of adding and 1e-4 for the cross-entropy of pixelwise MNIST.

    Args:
        gates: As a module returns them with ``return_gates=True``; those of several layers or
            directions are added up.
        cost: λ of one update; 0 for no budget.
        lengths: Timesteps of each sequence, ``(B,)``, if the batch is padded: later ones do not
            count. A packed batch knows them.
        batch_first: Whether gates are ``(B, T)``, as the module has it.

    Returns:
        A scalar.

    Raises:
        TypeError: If ``cost`` is not a number, or ``gates`` are not gates.
        ValueError: If an argument is out of range or does not fit the gates.

    Example:
        >>> gates = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])  # (T, B)
        >>> skip_budget_loss(gates, 0.1)
        tensor(0.2500)
        >>> skip_budget_loss(gates, 0.1, lengths=[3, 1])
        tensor(0.1500)
    """
    check_number("cost", cost, at_least=0, below=math.inf)
    counts = [_count(part, lengths, batch_first=batch_first) for part in _each(gates)]
    updates = torch.stack([used for used, _, _ in counts]).sum()
    return cost * updates / counts[0][2]


def update_share(
    gates: Gates, lengths: Lengths | None = None, *, batch_first: bool = False
) -> Tensor:
    """Share of the timesteps at which the state was updated, of all gates together.

    A state that is copied needs none of the layer's arithmetic, and from one update to the next
    ``ceil(0.5 / Δũ) − 1`` timesteps are known to be copies beforehand. Dense code as this computes
    them nevertheless: the share says what a sparse implementation would save, not the time here.

    Args:
        gates: See :func:`skip_budget_loss`.
        lengths: See :func:`skip_budget_loss`.
        batch_first: See :func:`skip_budget_loss`.

    Returns:
        A scalar in [0, 1] without gradient.

    Raises:
        TypeError: If ``gates`` are not gates.
        ValueError: If ``lengths`` do not fit the gates.

    Example:
        >>> update_share(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        tensor(0.7500)
    """
    counts = [_count(part, lengths, batch_first=batch_first) for part in _each(gates)]
    updates = torch.stack([used for used, _, _ in counts]).sum()
    return updates.detach() / sum(timesteps for _, timesteps, _ in counts)


def _each(gates: Gates) -> tuple[Input, ...]:
    # A PackedSequence is itself a tuple.
    if isinstance(gates, (Tensor, PackedSequence)):
        return (gates,)
    check_type("gates", gates, (tuple, list), "as a Skip RNN returns them")
    return tuple(gates)


def _count(
    gates: Input, lengths: Lengths | None, *, batch_first: bool
) -> tuple[Tensor, int | Tensor, int]:
    """How many updates, of how many timesteps, in how many sequences."""
    if isinstance(gates, PackedSequence):
        if lengths is not None:
            raise ValueError(f"lengths must be left out for packed gates, got {lengths!r}")
        return gates.data.sum(), gates.data.numel(), int(gates.batch_sizes[0])
    if gates.dim() not in (1, 2):
        raise ValueError(f"gates must be (T, B) or (T,), got shape {tuple(gates.shape)}")
    if gates.dim() == 1:
        gates, batch_first = gates.unsqueeze(1), False
    gates_TB = gates.T if batch_first else gates
    if lengths is None:
        return gates_TB.sum(), gates_TB.numel(), gates_TB.size(1)
    lengths_B = torch.as_tensor(lengths, device=gates.device)
    if lengths_B.shape != gates_TB.shape[1:]:
        raise ValueError(
            f"lengths must be one for each of {gates_TB.size(1)} sequences, got {lengths!r}"
        )
    counted_TB = torch.arange(gates_TB.size(0), device=gates.device)[:, None] < lengths_B
    # Not a product: what is padded may be anything.
    updates = torch.where(counted_TB, gates_TB, gates_TB.new_zeros(())).sum()
    return updates, counted_TB.sum(), gates_TB.size(1)
