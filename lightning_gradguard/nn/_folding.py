"""Sequences of which every s-th timestep belongs together, as s times as many shorter sequences.

Timestep t of sequence b becomes timestep t // s of chain (t mod s, b), so that a kernel that goes
on from one timestep to the next goes on from each to the one s later.

Shape suffixes: ``T`` time, ``B`` batch, ``N`` all timesteps of all sequences, ``I`` input, ``S``
dilation, ``C`` chains, S times B, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.nn._scan import States
from lightning_gradguard.nn._sequences import Input

# Runs over chains from the state of each, (B, H); returns the output and the last state of each.
Run = Callable[[Input, States], tuple[Input, States]]


def run_dilated(
    run: Run,
    x: Tensor,
    states: States,
    batch_sizes: Tensor | None,
    dilation: int,
    *,
    reverse: bool = False,
) -> tuple[Tensor, States]:
    """Run over sequences so that each timestep goes on from the one ``dilation`` before it.

    Args:
        run: One layer in one direction.
        x: ``(T, B, I)``, or ``(N, I)`` if packed, longest sequence first.
        states: After each of the S timesteps before the first, oldest first, ``(S, B, H)`` each.
        batch_sizes: How many sequences are alive at each timestep, if packed; on the host.
        dilation: S.
        reverse: Go from the end of each sequence to its beginning.

    Returns:
        The output, in the layout of ``x``, and the states after the last S timesteps, as given.
    """
    if batch_sizes is not None:
        return _run_packed(run, x, states, batch_sizes, dilation, reverse=reverse)
    output, ends = _run_padded(run, x.flip(0) if reverse else x, states, dilation)
    return output.flip(0) if reverse else output, ends


def _run_padded(run: Run, x: Tensor, states: States, dilation: int) -> tuple[Tensor, States]:
    """Over sequences of one length.

    First the timesteps that are too many to divide by S, as one step of fewer chains: kernels for
    chains of different lengths take several times as long.
    """
    rest = x.size(0) % dilation
    outputs = []
    for part in x.split([rest, x.size(0) - rest]) if rest else (x,):
        width = min(dilation, part.size(0))
        if not width:
            continue
        # Sizes in full: of an empty batch none can be left to be found.
        chains = part.reshape(part.size(0) // width, width * part.size(1), part.size(2))
        output, last = run(chains, tuple(state[:width].flatten(0, 1) for state in states))
        data = _data(output)
        outputs.append(data.reshape(*part.shape[:2], data.size(-1)))
        states = tuple(
            torch.cat((old[width:], new.reshape(width, *old.shape[1:]))) if width < dilation
            else new.reshape(old.shape)
            for old, new in zip(states, last, strict=True)
        )  # fmt: skip
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), states


def _run_packed(
    run: Run, x: Tensor, states: States, batch_sizes: Tensor, dilation: int, *, reverse: bool
) -> tuple[Tensor, States]:
    """Over sequences of different lengths: chains are packed as well."""
    if dilation == 1 and not reverse:
        output, last = run(PackedSequence(x, batch_sizes), tuple(state[0] for state in states))
        return _data(output), tuple(state.unsqueeze(0) for state in last)
    chains = _Chains.of(batch_sizes, dilation, x.device, reverse=reverse)
    begun = tuple(state.flatten(0, 1).index_select(0, chains.order) for state in states)
    output, last = run(PackedSequence(x.index_select(0, chains.rows_N), chains.sizes), begun)
    ends = tuple(
        torch.cat((old.flatten(0, 1), new)).index_select(0, chains.ends_C).view_as(old)
        for old, new in zip(states, last, strict=True)
    )
    return _data(output).index_select(0, chains.places_N), ends


def _data(sequences: Input) -> Tensor:
    return sequences.data if isinstance(sequences, PackedSequence) else sequences


@dataclass(frozen=True, eq=False)
class _Chains:
    """Where everything stands once sequences of different lengths are chains.

    Attributes:
        sizes: How many chains are alive at each of their timesteps, on the host.
        order: The chains that have a timestep, longest first, counted as ``(S, B)``.
        rows_N: Which rows of the data those of the chains are.
        places_N: Which rows of the chains those of the data are.
        ends_C: Where the last S states of each sequence, ``(S, B)``, stand among those that it
            began with, ``(S, B)``, and after them the last ones of the chains in their order.
    """

    sizes: Tensor
    order: Tensor
    rows_N: Tensor
    places_N: Tensor
    ends_C: Tensor

    @classmethod
    def of(
        cls, batch_sizes_T: Tensor, dilation: int, device: torch.device, *, reverse: bool
    ) -> _Chains:
        """All of it is found on the host, where the batch sizes are."""
        batch = int(batch_sizes_T[0])
        columns_B = _count(batch)
        lengths_B = (batch_sizes_T.unsqueeze(1) > columns_B).sum(0)
        phases_S1 = _count(dilation).unsqueeze(1)
        chain_lengths_C = (lengths_B - phases_S1 + dilation - 1).flatten() // dilation
        order_C = chain_lengths_C.argsort(descending=True, stable=True)
        missing = -len(batch_sizes_T) % dilation
        sizes = torch.nn.functional.pad(batch_sizes_T, (0, missing)).view(-1, dilation).sum(1)
        # For every row of the chains its timestep in the chain, the chain, and so the timestep.
        steps_N = torch.repeat_interleave(sizes)
        chains_N = order_C[_count(len(steps_N)) - (sizes.cumsum(0) - sizes)[steps_N]]
        columns_N = chains_N % batch
        times_N = steps_N * dilation + chains_N // batch
        if reverse:
            times_N = lengths_B[columns_N] - 1 - times_N
        rows_N = (batch_sizes_T.cumsum(0) - batch_sizes_T)[times_N] + columns_N
        times_SB = lengths_B - dilation + phases_S1
        last_SB = order_C.argsort()[times_SB.remainder(dilation) * batch + columns_B]
        first_SB = (times_SB + dilation) * batch + columns_B
        ends_SB = torch.where(times_SB < 0, first_SB, last_SB + dilation * batch)
        order, places_N = order_C[: int(sizes[0])], rows_N.argsort()
        found = (order, rows_N, places_N, ends_SB.flatten())
        return cls(sizes, *(index.to(device, non_blocking=True) for index in found))


def _count(number: int) -> Tensor:
    return torch.arange(number, device="cpu")
