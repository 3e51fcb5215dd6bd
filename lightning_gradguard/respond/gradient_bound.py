"""The cap for SGD: bound the gradients, and with them every update.

Shape legend: ``P`` parameters, ``G`` parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.measure import GradNorms
from lightning_gradguard.measure.sharding import ShardReducer, local_tensor
from lightning_gradguard.respond.cap_enforcement import local_norms
from lightning_gradguard.respond.shrinking_bound import ShrinkingBound
from lightning_gradguard.respond.weight_norms import NEAR_SHARE, WeightNorms, group_sizes

# On the device the latest shares are unknown, and until the clip has a baseline nothing else bounds
# what may have come since: gradients are scaled on each of these steps.
UNCLIPPED_STEPS = 32
# A momentum that has settled reaches the cap exactly; beyond it is what rounding does not explain.
_SLACK = 1.01


class GradientBound(ShrinkingBound):
    """Keeps ‖g‖ ≤ (1 - momentum) · ``max_ratio`` · ‖W‖ / lr for SGD.

    The momentum buffer is a sum of past gradients with weights that add up to 1 / (1 - momentum),
    so no update exceeds ``max_ratio`` · ‖W‖ (weight decay, which is small, aside). Gradients that
    entered it when the rate was smaller or the cap wider may exceed it later: until they have
    faded, the updates themselves are shrunk.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        *,
        on_device: bool,
        large_ratio: float = math.inf,
        allowances: Sequence[float] = (),
    ) -> None:
        super().__init__(
            optimizer,
            parameters,
            on_device=on_device,
            large_ratio=large_ratio,
            allowances=allowances,
        )
        self._weights = WeightNorms(parameters, allowances)
        self._sizes = group_sizes(optimizer, parameters)
        self._shares_P = torch.zeros(0)
        self._held_back: int | Tensor = 0
        self._momenta = self._measured_momenta()  # bounds on ‖buffer‖ / ‖W‖ of each group

    @torch.no_grad()
    def _measured_momenta(self) -> list[float]:
        """The largest ‖buffer‖ / ‖W‖ of each group; 0 before the first step, at no cost."""
        states = [self._optimizer.state.get(p, {}) for p in self._parameters]
        buffers = [state.get("momentum_buffer") for state in states]
        if all(buffer is None for buffer in buffers):
            return [0.0] * len(self._sizes)
        pairs = zip(buffers, self._parameters, strict=True)
        parts = [local_tensor(torch.zeros_like(p) if b is None else b) for b, p in pairs]
        squares_P = ShardReducer(self._parameters).sum(local_norms(parts).square())
        weights = WeightNorms(self._parameters, self._allowances)
        weights.refresh()
        if weights.norms_P is None:
            return [0.0] * len(self._sizes)
        shares = iter((squares_P.sqrt() / weights.norms_P).tolist())
        return [max((next(shares) for _ in range(size)), default=0.0) for size in self._sizes]

    def signal(self, norms: GradNorms) -> Tensor | None:
        """(G,) the largest ‖g‖ / ‖W‖ of each group."""
        self._weights.refresh()
        if self._weights.norms_P is None:
            return None
        self._shares_P = norms.values / self._weights.norms_P
        if len(self._sizes) == 1:
            return self._shares_P.amax(0, keepdim=True)
        parts = self._shares_P.split(self._sizes)
        return torch.stack([part.amax() if len(part) else part.sum() for part in parts])

    def before_step(
        self, max_ratio: float, coefficient: float | Tensor, seen: Sequence[float]
    ) -> None:
        """Scale down the gradients of the tensors that are over their bound."""
        self._held_back = self.large = 0
        self._max_ratio = max_ratio
        self._steps += 1
        groups = self._optimizer.param_groups
        limits = [_limit(group, max_ratio) for group in groups]
        large = [_limit(group, self._large_ratio) for group in groups]
        self._copy_where_momentum_is_large(limits, seen or limits)
        # On the device the shares are some steps old: leave room for them to have grown.
        # Some gradients may not have been clipped at all where the factors differ.
        room = 1.0 / coefficient if isinstance(coefficient, float) else 1.0
        room = NEAR_SHARE if self._on_device else room
        early = self._on_device and self._steps <= UNCLIPPED_STEPS
        if (
            not early
            and seen
            and all(
                peak <= room * min(pair) for peak, *pair in zip(seen, limits, large, strict=True)
            )
        ):
            return
        shares_P = self._shares_P * coefficient
        limits_P, large_P = self._spread(limits), self._spread(large)
        scales_P = (limits_P / shares_P).clamp_(max=1.0)
        if self._on_device:
            self.large = (shares_P > large_P).sum()
            if math.isinf(max_ratio):
                return
            self._scale(range(len(self._parameters)), list(scales_P.unbind()))
            self._held_back = (scales_P < 1.0).sum()
            return
        scales, beyond = torch.stack([scales_P, (shares_P > large_P).to(scales_P)]).tolist()
        over = [i for i, scale in enumerate(scales) if scale < 1.0]
        self._scale(over, [scales[i] for i in over])
        self._held_back, self.large = len(over), int(sum(beyond))

    def _copy_where_momentum_is_large(
        self, limits: Sequence[float], peaks: Sequence[float]
    ) -> None:
        chosen: list[int] = []
        start = 0
        for number, group in enumerate(self._optimizer.param_groups):
            # after scaling no gradient is beyond its limit; a peak of NaN belongs to a dropped step
            newest = limits[number] if not peaks[number] < limits[number] else peaks[number]
            newest = newest if math.isfinite(newest) else 0.0
            self._momenta[number] = group["momentum"] * self._momenta[number] + newest
            reach = float(group["lr"]) * self._momenta[number]
            if group["momentum"] > 0.0 and reach > _SLACK * self._max_ratio:
                chosen += range(start, start + self._sizes[number])
            start += self._sizes[number]
        self._shrinker.copy(chosen)

    def _spread(self, values: Sequence[float]) -> Tensor:
        """(P,) the value of each tensor's group."""
        if len(self._sizes) == 1:
            return torch.full_like(self._shares_P, values[0])
        pairs = zip(values, self._sizes, strict=True)
        return torch.cat([self._shares_P.new_full((size,), value) for value, size in pairs])

    def _scale(self, numbers: Sequence[int], scales: Sequence[Any]) -> None:
        gradients = [(self._parameters[i].grad, s) for i, s in zip(numbers, scales, strict=True)]
        pairs = [(local_tensor(g), s) for g, s in gradients if g is not None]
        if pairs:
            torch._foreach_mul_([g for g, _ in pairs], [s for _, s in pairs])

    def after_step(self) -> int | Tensor:
        """How many tensors were held back, by their gradient or by their update."""
        shrunk, held = self._shrinker.shrink(self._max_ratio), self._held_back
        if not isinstance(shrunk, Tensor) and not isinstance(held, Tensor):
            return max(shrunk, held)
        both = [torch.as_tensor(n, device=self._shares_P.device) for n in (shrunk, held)]
        return torch.maximum(*both)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""
        return {
            "weights": self._weights.state_dict(),
            "momenta": list(self._momenta),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._weights.load_state_dict(state["weights"])
        if len(state["momenta"]) == len(self._momenta):
            self._momenta = [float(bound) for bound in state["momenta"]]
            self._steps = int(state["steps"])


def _limit(group: Mapping[str, Any], max_ratio: float) -> float:
    rate, momentum = float(group["lr"]), group["momentum"]
    share = 1.0 - momentum if momentum < 1.0 else 0.0
    return share * max_ratio / rate if rate > 0.0 else math.inf
