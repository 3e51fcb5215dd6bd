"""What a few elements of each gradient show, and which of its rows are zero.

Shape suffixes: ``N`` tensors of one group, ``S`` sampled elements of a group, ``R`` rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradguard.measure._sharded import has_pending_sum, is_dtensor

# Elements per tensor that are looked at.
_SAMPLES = 64
# Gradients of one shape up to this size are stacked, as a call for each would cost more.
_SMALL = 16384
# float16: its subnormal numbers are multiples of the least of them.
_HALF_LEAST = 2.0**-24
_HALF_NORMAL_STEPS = 2.0**10

_Kind = tuple[int, torch.dtype, torch.device, torch.Size]


@dataclass(frozen=True, eq=False)
class _Group:
    """Gradients that are handled in one call.

    Attributes:
        members: Which.
        positions_N: The same, where results are collected.
        segments_S: Which member each sampled element belongs to.
        counts_N: Sampled elements per member.
    """

    members: tuple[int, ...]
    positions_N: Tensor
    segments_S: Tensor | None = None
    counts_N: Tensor | None = None


class GradientSamples:
    """Looks at a few elements of each gradient and, of weights, for rows that are zero.

    What it needs on the device is put there when gradients of another kind come than before, so
    that otherwise the host never waits.
    """

    def __init__(self) -> None:
        self._key: tuple[_Kind, ...] = ()
        self._device = torch.device("cpu")
        self._samples: list[_Group] = []
        self._rows: list[_Group] = []

    def measure(
        self, grads: Sequence[Tensor | None], row_dims: Sequence[int | None], half_scale: float
    ) -> Tensor:
        """(3, P) shares of zero elements, of tiny elements, and of rows that are zero.

        Args:
            grads: Dense local gradients; ``None`` for those that are not to be looked at.
            row_dims: Dimension of each gradient's rows; ``None`` if it has none.
            half_scale: What float32 gradients are to be multiplied by to be those that a backward
                pass in float16 has computed; 0 if it was not in float16.

        Returns:
            float32 where the first gradient is; NaN for what is not known.
        """
        key = tuple(
            (i, grad.dtype, grad.device, grad.shape)
            for i, grad in enumerate(grads)
            if grad is not None
        )
        if key != self._key:
            self._plan(key, row_dims)
        result = torch.full((3, len(grads)), torch.nan, device=self._device)
        for group in self._samples:
            zero_N, tiny_N = _sampled_shares(group, grads, half_scale)
            shares = torch.stack([zero_N, tiny_N]).to(self._device, non_blocking=True)
            result[:2].index_copy_(1, group.positions_N, shares)
        for group in self._rows:
            share_N = _zero_rows([grads[i] for i in group.members], row_dims[group.members[0]])
            share_N = share_N.to(self._device, non_blocking=True)
            result[2].index_copy_(0, group.positions_N, share_N)
        return result

    def _plan(self, key: tuple[_Kind, ...], row_dims: Sequence[int | None]) -> None:
        self._key = key
        devices = [device for _, _, device, _ in key]
        # Never a CPU when any gradient is elsewhere: what is copied there could be read too early.
        others = [device for device in devices if device.type != "cpu"]
        self._device = next(iter(others or devices), torch.device("cpu"))
        samples: dict[tuple[object, ...], list[int]] = {}
        rows: dict[tuple[object, ...], list[int]] = {}
        for i, dtype, device, shape in key:
            samples.setdefault((dtype, device), []).append(i)
            if row_dims[i] is not None:
                one = i if shape.numel() > _SMALL else -1
                rows.setdefault((dtype, device, shape, row_dims[i], one), []).append(i)
        shapes = {i: shape for i, _, _, shape in key}
        self._samples = [
            self._sample_group(members, [len(_places(shapes[i].numel())) for i in members], device)
            for (_, device), members in samples.items()
        ]
        self._rows = [
            _Group(tuple(members), torch.tensor(members, device=self._device))
            for members in rows.values()
        ]

    def _sample_group(self, members: list[int], counts: list[int], device: object) -> _Group:
        counts_N = torch.tensor(counts)
        return _Group(
            tuple(members),
            torch.tensor(members, device=self._device),
            torch.repeat_interleave(counts_N).to(device),  # type: ignore[call-overload]
            counts_N.to(device, torch.float32),  # type: ignore[call-overload]
        )


def plain_gradient(parameter: Tensor) -> Tensor | None:
    """What this process holds of a gradient, as a dense real tensor; ``None`` if it is not one.

    Nothing is sent: summands that are still to be added up over processes say nothing here.
    """
    grad = parameter.grad
    if grad is not None and is_dtensor(grad):
        grad = None if has_pending_sum(grad) else grad.to_local()  # type: ignore[attr-defined]
    if grad is None or grad.layout is not torch.strided or not grad.numel():
        return None
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    return grad.detach()


@functools.lru_cache(maxsize=4096)
def _places(numel: int) -> range:
    """Elements to look at, spread evenly."""
    stride = -(-numel // _SAMPLES)
    if stride > 2 and stride % 2 == 0:
        stride += 1  # an even stride would meet the same column of a power-of-two matrix each time
    return range((stride - 1) // 2, numel, stride)


def _sample(grad: Tensor) -> Tensor:
    places = _places(grad.numel())
    if grad.is_contiguous():
        offset = grad.storage_offset() + places.start
        return grad.as_strided((len(places),), (places.step,), offset)
    return grad.reshape(-1)[places.start :: places.step]


def _sampled_shares(
    group: _Group, grads: Sequence[Tensor | None], half_scale: float
) -> tuple[Tensor, Tensor]:
    chosen = (grads[i] for i in group.members)
    values_S = torch.cat([_sample(grad) for grad in chosen if grad is not None])
    size_S = values_S.abs()
    flags_S = torch.stack([values_S == 0, _is_tiny(size_S, half_scale)]).float()
    sums = flags_S.new_zeros(2, len(group.members))
    if group.segments_S is not None and group.counts_N is not None:
        sums = sums.index_add_(1, group.segments_S, flags_S) / group.counts_N
    return sums[0], sums[1]


def _is_tiny(size_S: Tensor, half_scale: float) -> Tensor:
    """Which have lost digits in the dtype that they were computed in."""
    tiny_S = (size_S > 0) & (size_S < torch.finfo(size_S.dtype).tiny)
    if size_S.dtype is torch.float32 and half_scale:
        steps_S = size_S * (half_scale / _HALF_LEAST)
        # A scale that is no power of two has cost the last digits.
        whole_S = (steps_S - steps_S.round()).abs() <= steps_S * 2.0**-21
        tiny_S |= (size_S > 0) & (steps_S < _HALF_NORMAL_STEPS) & whole_S
    return tiny_S


def _zero_rows(grads: Sequence[Tensor | None], dim: int | None) -> Tensor:
    """(N,) share of zero rows of gradients of one shape."""
    stacked = [grad.movedim(dim or 0, 0).flatten(1) for grad in grads if grad is not None]
    if len(stacked) == 1:
        # Of a large gradient no copy is made; both are NaN where an element is.
        rows_R = stacked[0]
        dead_NR = ((rows_R.amax(1) == 0) & (rows_R.amin(1) == 0)).unsqueeze(0)
    else:
        dead_NR = ~(torch.stack(stacked) != 0).any(2)
    return dead_NR.float().mean(1)
