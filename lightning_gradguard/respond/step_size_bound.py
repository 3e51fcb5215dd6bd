"""The cap for Adam and its relatives: bound the step that the learning rate allows.

Shape legend: ``P`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.measure import GradNorms
from lightning_gradguard.respond.cap_enforcement import real_numel
from lightning_gradguard.respond.shrinking_bound import ShrinkingBound
from lightning_gradguard.respond.weight_norms import NEAR_SHARE, WeightNorms, group_numbers

# In its first steps RAdam does not normalize yet, NAdam's momentum is ahead of itself and RMSprop's
# average is still near zero: the real step may be far beyond ``lr``, so every tensor is copied.
FIRST_STEPS = 8
_LATE_TO_NORMALIZE = (torch.optim.RAdam, torch.optim.NAdam, torch.optim.RMSprop)


class StepSizeBound(ShrinkingBound):
    """Keeps lr·√numel ≤ ``max_ratio`` · ‖W‖ for Adam and its relatives, and the real update too.

    The tensors for which the step would be larger have their update scaled by the same factor at
    every step, as if their learning rate were smaller. So the bound does not depend on how well
    the gradients of the moment agree.

    Args:
        optimizer: The optimizer.
        parameters: Its parameters, each once.
        on_device: Decide on the device, with no host read.
        large_ratio: What counts as a large relative update, whether or not it is held back.
        ordinary_ratio: While no more than half of the tensors are large, the learning rate is an
            ordinary one, and they are held to this instead of a smaller ``max_ratio``. A rate
            that was not ordinary does not become so by weights that grow under it.
        allowances: What each tensor's share is multiplied by; none for 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        *,
        on_device: bool,
        large_ratio: float = math.inf,
        ordinary_ratio: float = 0.0,
        allowances: Sequence[float] = (),
    ) -> None:
        super().__init__(
            optimizer,
            parameters,
            on_device=on_device,
            large_ratio=large_ratio,
            allowances=allowances,
        )
        self._ordinary_ratio = ordinary_ratio
        self._weights = WeightNorms(parameters, allowances)
        self._group_of = group_numbers(optimizer, parameters)
        self._roots = [math.sqrt(real_numel(p)) for p in parameters]
        self._norms: list[float] = []
        self._potentials: list[float] = []  # expected ratio per unit of learning rate
        self._peaks: list[float] = []
        self._too_high: list[float] = []  # per group, the lowest rates that were not ordinary
        self._scales: list[float] = []

    def signal(self, norms: GradNorms) -> Tensor | None:
        """(P,) the norms of the weights, on the steps on which they were measured."""
        due = self._weights.refresh()
        if not self._norms and self._weights.norms_P is not None:
            self._learn(self._weights.norms_P.tolist())  # the first step must know them at once
        return self._weights.norms_P if due else None

    def _learn(self, norms: Sequence[float]) -> None:
        self._norms = list(norms)
        self._potentials = [root / norm for root, norm in zip(self._roots, norms, strict=True)]
        groups: list[list[float]] = [[0.0] for _ in self._optimizer.param_groups]
        for group, potential in zip(self._group_of, self._potentials, strict=True):
            groups[group].append(potential)
        self._peaks = [max(potentials) for potentials in groups]

    def before_step(
        self, max_ratio: float, coefficient: float | Tensor, seen: Sequence[float]
    ) -> None:
        """Copy the tensors whose step is large."""
        if seen:
            self._learn(seen)
        self._steps += 1
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        if max_ratio < self._ordinary_ratio and self._is_ordinary(rates):
            max_ratio = self._ordinary_ratio
        self._max_ratio = max_ratio
        if math.isinf(max_ratio):
            self.large = self._count_large(rates)
            self._shrinker.copy([])
            return
        early = self._steps <= FIRST_STEPS and isinstance(self._optimizer, _LATE_TO_NORMALIZE)
        near = 0.0 if early else NEAR_SHARE * max_ratio
        if all(rate * peak < near for rate, peak in zip(rates, self._peaks, strict=True)):
            self.large = 0
            self._shrinker.copy([])
            return
        expected = [
            rates[group] * potential
            for group, potential in zip(self._group_of, self._potentials, strict=True)
        ]
        chosen = [
            i
            for i, (ratio, parameter) in enumerate(zip(expected, self._parameters, strict=True))
            if not ratio < near and parameter.grad is not None
        ]
        self.large = sum(expected[i] > self._large_ratio for i in chosen)
        # A warm-up may begin with a rate of zero, at which nothing moves.
        self._scales = [max_ratio / max(expected[i], max_ratio) for i in chosen]
        self._shrinker.copy(chosen)

    def _is_ordinary(self, rates: Sequence[float]) -> bool:
        """Whether no more than half of the tensors would make a large step, now and before."""
        if self._makes_large_steps(rates):
            lowest = self._too_high or rates
            self._too_high = [min(pair) for pair in zip(rates, lowest, strict=True)]
            return False
        return not self._too_high or any(
            rate < high for rate, high in zip(rates, self._too_high, strict=True)
        )

    def _makes_large_steps(self, rates: Sequence[float]) -> bool:
        return self._count_large(rates) > self._movable(rates) // 2

    def _movable(self, rates: Sequence[float]) -> int:
        return sum(
            rates[group] > 0.0 and parameter.requires_grad
            for group, parameter in zip(self._group_of, self._parameters, strict=True)
        )

    def _count_large(self, rates: Sequence[float]) -> int:
        """How many tensors' steps are large at these rates."""
        if all(r * peak <= self._large_ratio for r, peak in zip(rates, self._peaks, strict=True)):
            return 0
        measured = zip(self._group_of, self._potentials, self._parameters, strict=True)
        return sum(
            rates[group] * potential > self._large_ratio and parameter.requires_grad
            for group, potential, parameter in measured
        )

    def after_step(self) -> int | Tensor:
        """Scale the large updates down; returns how many there were."""
        return self._shrinker.shrink(self._max_ratio, self._scales)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""
        return {
            "weights": self._weights.state_dict(),
            "norms": list(self._norms),
            "steps": self._steps,
            "too_high": list(self._too_high),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._weights.load_state_dict(state["weights"])
        if len(state["norms"]) == len(self._roots):
            self._learn(state["norms"])
            self._steps = int(state["steps"])
            self._too_high = [float(rate) for rate in state["too_high"]]
