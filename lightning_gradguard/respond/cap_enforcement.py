"""Bound how far one optimizer step may move each tensor, relative to the tensor itself.

What kills a run is not the gradient but the size of the update relative to the weights, and under
Adam clipping the gradient cannot bound that. The cap works on the real update of any optimizer:
tensors that may come near the cap are copied before the step, and the ones that went beyond it are
moved back along their own update afterwards. Where nothing is near, nothing is copied.

Shape legend: ``P`` parameters, ``N`` parameters near the cap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.measure._plan import norm_each
from lightning_gradguard.measure.sharding import ShardReducer, local_tensor
from lightning_gradguard.measure.updates import RMS_FLOOR, UpdateSampler

# A tensor is copied when its predicted ratio reaches this share of the cap. The prediction is a
# sampled estimate (about 10 % off) times the growth of gradient and learning rate since then.
NEAR_SHARE = 0.5
# How often to check that no tensor was given new storage (``p.data = ...``).
STALE_CHECK_EVERY = 16


class UpdateCapEnforcer:
    """Holds ‖ΔW‖ ≤ ``max_ratio`` · max(‖W‖, 1e-3·√numel) for every tensor, for any optimizer.

    Call :meth:`before_step` just before ``optimizer.step()`` and :meth:`after_step` just after.

    Args:
        parameters: The optimizer's parameters.
        on_device: Decide on the device with no host read (for fused optimizers on an accelerator);
            the near tensors are then chosen from values the caller read some steps ago.

    Example:
        >>> import torch
        >>> weight = torch.ones(10, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> weight.grad = torch.ones(10)
        >>> cap = UpdateCapEnforcer([weight])
        >>> cap.before_step(max_ratio=0.03)
        >>> optimizer.step()
        >>> int(cap.after_step())
        1
        >>> round(weight[0].item(), 4)
        0.97
    """

    def __init__(self, parameters: Sequence[Tensor], *, on_device: bool = False) -> None:
        self._parameters = list(parameters)
        self._on_device = on_device
        self._steps = 0
        self._start()

    def _start(self) -> None:
        self._sampler = UpdateSampler(self._parameters)
        self._locals = [local_tensor(p) for p in self._parameters]
        self._prepare([])
        self._max_ratio = math.inf

    def before_step(self, max_ratio: float, predicted: Sequence[float] | None = None) -> None:
        """Copy the tensors that may reach the cap.

        Args:
            max_ratio: The cap for this step.
            predicted: (P,) upper estimates of this step's ratios; ``None`` where nothing is known,
                and then every tensor is copied. An entry of NaN counts as near.
        """
        self._max_ratio = max_ratio
        self._steps += 1
        if self._steps % STALE_CHECK_EVERY == 0 and self._sampler.stale():
            self._start()
            self._max_ratio, predicted = max_ratio, None
        near = self._choose(predicted)
        if near != self._near:
            self._prepare(near)
        if near:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, [self._locals[i].detach() for i in near])

    def _prepare(self, near: list[int]) -> None:
        """Room for the copies of the tensors ``near``, kept until the choice changes."""
        tensors = [self._locals[i] for i in near]
        self._near = near
        self._copies = [torch.empty_like(t) for t in tensors]
        self._reducer = ShardReducer([self._parameters[i] for i in near])
        device = tensors[0].device if tensors else None
        self._sizes_N = torch.tensor([float(t.numel()) for t in tensors], device=device)

    def _choose(self, predicted: Sequence[float] | None) -> list[int]:
        if predicted is None:
            return list(range(len(self._locals)))
        bound = NEAR_SHARE * self._max_ratio
        if max(predicted, default=0.0) < bound and not any(map(math.isnan, predicted)):
            return []
        return [i for i, ratio in enumerate(predicted) if not ratio < bound]

    @torch.no_grad()
    def after_step(self) -> int | Tensor:
        """Move back what went beyond the cap.

        Returns:
            How many tensors were capped: an ``int``, or a 0-dim tensor when deciding on the device.
        """
        if not self._near:
            return 0
        tensors = [self._locals[i].detach() for i in self._near]
        excess_N = self._excess(tensors)
        if self._on_device:
            weights_N = excess_N.clamp(min=1.0).reciprocal_()
            # lerp with weight 1 returns its end exactly: a tensor within the cap keeps its bits
            torch._foreach_lerp_(self._copies, tensors, list(weights_N.unbind()))
            torch._foreach_copy_(tensors, self._copies)
            return (excess_N > 1.0).sum()
        excess = excess_N.tolist()
        over = 0
        for tensor, copy, factor in zip(tensors, self._copies, excess, strict=True):
            if not factor <= 1.0:
                # an update that is not finite has no direction to keep
                tensor.copy_(copy.lerp_(tensor, 1.0 / factor) if math.isfinite(factor) else copy)
                over += 1
        return over

    def _excess(self, tensors: list[Tensor]) -> Tensor:
        """(N,) how many times over the cap each update is."""
        changes = torch._foreach_sub(tensors, self._copies)
        squares_3N = torch.stack(
            [
                norm_each(list(changes), torch.float32).square_(),
                norm_each(self._copies, torch.float32).square_(),
                self._sizes_N,
            ]
        )
        squares_3N = self._reducer.sum(squares_3N)
        floor_N = squares_3N[2] * RMS_FLOOR**2
        ratio_N = squares_3N[0].div_(torch.maximum(squares_3N[1], floor_N)).sqrt_()
        return ratio_N.div_(self._max_ratio)

    def ratios(self) -> Tensor | None:
        """(P,) sampled ratios of the step just taken, cap included; ``None`` after the first."""
        return self._sampler.ratios()
