"""How far an optimizer's step moved each tensor, relative to the tensor itself.

Shape legend: ``P`` parameters, ``S`` sampled elements of all parameters together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard._validation import check_number
from lightning_gradguard.measure.sharding import ShardReducer, local_tensor

# A tensor is never taken to have a smaller root mean square than this when its update is judged: a
# bias that starts at zero acts on activations of about 1, so its own norm says little about how far
# it may move, and a matrix that starts at zero (LoRA's ``B``) has to grow.
RMS_FLOOR = 0.1


class UpdateSampler:
    """Estimates ‖ΔW‖ / ‖W‖ of every tensor from a fixed subset of its elements.

    The subset is spread evenly over the tensor, so a tensor with at most ``samples`` elements is
    measured exactly and a larger one is an *estimate*: with 64 elements about 10 % off for dense
    updates, more for updates concentrated in few rows (an embedding). Between two calls it keeps
    ``samples`` numbers per tensor, not a copy of the model.

    Args:
        parameters: Tensors to watch. They must be updated in place, as every optimizer does;
            :meth:`stale` tells when one was given new storage instead.
        samples: Elements per tensor. Default 64: the estimate's error falls with its square root.

    Raises:
        TypeError: If ``samples`` is not an integer.
        ValueError: If ``samples`` is not positive.

    Example:
        >>> import torch
        >>> weight = torch.ones(100)
        >>> sampler = UpdateSampler([weight])
        >>> sampler.ratios() is None  # nothing to compare with yet
        True
        >>> weight *= 1.02
        >>> round(sampler.ratios().item(), 4)
        0.02
    """

    def __init__(self, parameters: Sequence[Tensor], samples: int = 64) -> None:
        check_number("samples", samples, at_least=1, integer=True)
        self._parameters = tuple(parameters)
        self._locals = tuple(local_tensor(p) for p in self._parameters)
        self._pointers = tuple(t.data_ptr() for t in self._locals)
        self._reducer = ShardReducer(self._parameters)
        self._views = [_spread(t, samples) for t in self._locals]
        counts = [view.numel() for view in self._views]
        self._device = self._locals[0].device if self._locals else torch.device("cpu")
        self._uniform = len({t.device for t in self._locals}) <= 1
        self._equal_count = counts[0] if len(set(counts)) == 1 and counts[0] > 0 else None
        self._lengths = torch.tensor(counts, device=self._device)
        floors = [count * RMS_FLOOR**2 for count in counts]
        self._floors = torch.tensor(floors, device=self._device)
        self._previous: Tensor | None = None

    def stale(self) -> bool:
        """Whether a tensor was moved to other storage, so that the sample no longer follows it."""
        return any(
            local_tensor(p).data_ptr() != pointer
            for p, pointer in zip(self._parameters, self._pointers, strict=True)
        )

    @torch.no_grad()
    def ratios(self) -> Tensor | None:
        """‖ΔW‖ / max(‖W‖, floor) since the last call, estimated.

        Returns:
            (P,) float32 on the device of the first parameter, or ``None`` on the first call.
            No host read; sharded tensors are combined over their ranks in one collective.
        """
        if not self._views:
            return None
        sample_S = self._gather()
        previous_S, self._previous = self._previous, sample_S
        if previous_S is None:
            return None
        change_S = sample_S - previous_S
        squares_3P = torch.stack(
            [
                self._segment_sum(change_S.square_()),
                self._segment_sum(previous_S.square_()),
                self._floors,
            ]
        )
        squares_3P = self._reducer.sum(squares_3P)
        return squares_3P[0].div_(torch.maximum(squares_3P[1], squares_3P[2])).sqrt_()

    def _gather(self) -> Tensor:
        if self._uniform:
            sample = torch.cat(self._views)
            return sample if sample.dtype == torch.float32 else sample.float()
        return torch.cat([v.to(self._device, torch.float32) for v in self._views])

    def _segment_sum(self, values_S: Tensor) -> Tensor:
        if self._equal_count is not None:
            return values_S.view(-1, self._equal_count).sum(1)
        return torch.segment_reduce(values_S, "sum", lengths=self._lengths, unsafe=True)


def _spread(tensor: Tensor, samples: int) -> Tensor:
    """A 1-D view of at most ``samples`` elements of ``tensor``, spread over its storage.

    Storage with holes cannot be sampled by a view: it gives no elements and so a ratio of NaN,
    which every caller must read as "not known".
    """
    flat = tensor.detach()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    # channels_last and other permutations of dense storage: which element is which is irrelevant
    flat = flat.permute(sorted(range(flat.dim()), key=flat.stride, reverse=True))
    if not flat.is_contiguous():
        return flat.new_empty(0)
    stride = -(-flat.numel() // samples) or 1
    if stride > 2 and stride % 2 == 0:
        stride += 1  # an even stride would meet the same column of a power-of-two matrix each time
    return flat.view(-1)[(stride - 1) // 2 :: stride]


class UpdateForecast:
    """Foretells the relative updates of the coming step from those of the last ones.

    The update of most optimizers grows no faster than its gradient, so the last ratio times the
    growth of the gradient's norm bounds the next one, up to the sampling error. (The growth of the
    learning rate is known on the host, and is for the caller to add.) Some pause instead, as Rprop
    does where a gradient changes its sign: one small update does not let a large one be forgotten.
    """

    _MEMORY = 0.9  # what remains of a ratio after one step: half of it after seven
    _LEAST = torch.finfo(torch.float32).eps

    def __init__(self) -> None:
        self._norms_P: Tensor | None = None
        self._ratios_P: Tensor | None = None
        self._saved: tuple[list[float], list[float]] | None = None

    def record(self, ratios_P: Tensor | None) -> None:
        """Take in the ratios of the step just taken, (P,); ``None`` where they are not known."""
        if ratios_P is not None and self._ratios_P is not None:
            remembered_P = (self._ratios_P * self._MEMORY).nan_to_num_(0.0, 0.0)
            ratios_P = torch.maximum(ratios_P, remembered_P)
        self._ratios_P = ratios_P

    def ratios(self, norms_P: Tensor) -> Tensor | None:
        """(P,) expected ratios given the gradient norms of the coming step; no host read.

        Returns ``None`` while there is no past, and NaN where nothing can be said.
        """
        if self._saved is not None:
            self._norms_P, self._ratios_P = map(norms_P.new_tensor, self._saved)
            self._saved = None
        previous_P, self._norms_P = self._norms_P, norms_P
        if previous_P is None or self._ratios_P is None:
            return None
        growth_P = norms_P / previous_P.clamp(min=torch.finfo(previous_P.dtype).tiny)
        # A tensor that did not move (no gradient, or an update lost in rounding) may move yet.
        ratios_P = self._ratios_P.to(norms_P.device).clamp(min=self._LEAST)
        return growth_P.clamp_(min=1.0).mul_(ratios_P)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues; ``None`` without a past."""
        if self._saved is not None:
            return dict(zip(("norms", "ratios"), self._saved, strict=True))
        if self._norms_P is None or self._ratios_P is None:
            return {"norms": None, "ratios": None}
        return {"norms": self._norms_P.tolist(), "ratios": self._ratios_P.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        norms, ratios = state["norms"], state["ratios"]
        self._saved = None if norms is None or ratios is None else (list(norms), list(ratios))
