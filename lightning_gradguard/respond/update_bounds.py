"""The cap on relative updates, each family of optimizers by its cheapest means.

* SGD's update is linear in the gradients, so bounding each tensor's gradient bounds every update,
  and keeps a huge gradient out of the momentum. Nothing is copied.
* Adam and its relatives normalize the gradient: a step is about ``lr`` in each element, whatever
  the gradient. Its size is known beforehand, and only tensors for which it is large are copied.
* Of any other optimizer the last updates are sampled, and tensors near the cap are copied.

All of them can be asked for a few device values to be read along with the gradient norm, so that
the cap needs no host read of its own on a step where it does not bind.

Shape legend: ``P`` parameters, ``G`` parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.measure import GradNorms
from lightning_gradguard.measure.sharding import ShardReducer, local_tensor
from lightning_gradguard.measure.updates import UpdateForecast, UpdateSampler, rms_floor
from lightning_gradguard.respond.cap_enforcement import UpdateShrinker, local_norms, real_numel

# Weight norms change by at most the cap in a step, so they are measured this rarely.
REFRESH_EVERY = 16
# A tensor is copied when its expected ratio reaches this share of the cap.
NEAR_SHARE = 0.5
# On the device the latest shares are unknown, and until the clip has a baseline nothing else bounds
# what may have come since: gradients are scaled on each of these steps.
UNCLIPPED_STEPS = 32
# A momentum that has settled reaches the cap exactly; beyond it is what rounding does not explain.
_SLACK = 1.01

# In its first steps RAdam does not normalize yet, and RMSprop's average is still near zero: the
# real step may be far beyond ``lr``, so every tensor is copied.
FIRST_STEPS = 8

# One step of these moves an element by about ``lr``.
_NORMALIZING = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.SparseAdam,
)


class UpdateBound(Protocol):
    """Holds every tensor's update to a share of its norm.

    Attributes:
        large: How many tensors would have moved by more than ``large_ratio`` in the last step.
    """

    large: int | Tensor

    def signal(self, norms: GradNorms) -> Tensor | None:
        """Device values, (K,), that :meth:`before_step` wants to be read, if any."""

    def before_step(
        self, max_ratio: float, coefficient: float | Tensor, seen: Sequence[float]
    ) -> None:
        """Prepare for the coming step.

        Args:
            max_ratio: The cap.
            coefficient: What the gradients are multiplied by because of clipping.
            seen: The latest signal that was read; empty if there is none.
        """

    def after_step(self) -> int | Tensor:
        """Finish the step; returns how many tensors were held back."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


def make_bound(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    *,
    on_device: bool,
    large_ratio: float = math.inf,
) -> UpdateBound:
    """The bound for this optimizer.

    Args:
        optimizer: Decides on the means; see the module's docstring.
        parameters: Its parameters, each once.
        on_device: Decide on the device, with no host read.
        large_ratio: What counts as a large relative update, whether or not it is held back.
    """
    kind: type[GradientBound | StepSizeBound | SampledBound]
    if type(optimizer) is torch.optim.SGD:
        kind = GradientBound
    elif isinstance(optimizer, _NORMALIZING) and not _may_leap(optimizer):
        kind = StepSizeBound
    else:
        kind = SampledBound
    return kind(optimizer, parameters, on_device=on_device, large_ratio=large_ratio)


def _may_leap(optimizer: Optimizer) -> bool:
    """Whether a normalizing optimizer can keep moving by many times ``lr``: some RMSprop.

    Its momentum adds up whole steps, and a centered second moment of a steady gradient is zero.
    """
    groups = optimizer.param_groups
    return any(group.get("momentum", 0.0) > 0.0 or group.get("centered", False) for group in groups)


class WeightNorms:
    """Measures max(‖W‖, floor) of every tensor now and then, on the device."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._reducer = ShardReducer(self._parameters)
        self._age = 0
        self.norms_P: Tensor | None = None

    @torch.no_grad()
    def refresh(self) -> bool:
        """Measure if it is time to; returns whether it was."""
        due = self.norms_P is None or self._age % REFRESH_EVERY == 0
        self._age += 1
        if due:
            tensors = [local_tensor(p).detach() for p in self._parameters]
            tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
            norms_P = local_norms(tensors)
            floors_P = norms_P.new_tensor(
                [
                    t.numel() * rms_floor(p) ** 2
                    for t, p in zip(tensors, self._parameters, strict=True)
                ]
            )
            squares_2P = self._reducer.sum(torch.stack([norms_P.square(), floors_P]))
            least = torch.finfo(squares_2P.dtype).tiny  # for a tensor without elements
            self.norms_P = torch.maximum(squares_2P[0], squares_2P[1]).clamp_(min=least).sqrt_()
        return due

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""
        norms = None if self.norms_P is None else self.norms_P.tolist()
        return {"age": self._age, "norms": norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; other parameters than then are measured afresh."""
        self._age = int(state["age"])
        norms = state["norms"]
        if norms is not None and len(norms) == len(self._parameters):
            self.norms_P = torch.tensor(norms, device=local_tensor(self._parameters[0]).device)


class GradientBound:
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
    ) -> None:
        self.large: int | Tensor = 0
        self._large_ratio = large_ratio
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._on_device = on_device
        self._weights = WeightNorms(parameters)
        self._sizes = _group_sizes(optimizer, parameters)
        self._shares_P = torch.zeros(0)
        self._held_back: int | Tensor = 0
        self._momenta = [0.0] * len(self._sizes)  # bounds on ‖buffer‖ / ‖W‖ of each group
        self._shrinker = UpdateShrinker(parameters, on_device=on_device)
        self._max_ratio = math.inf
        self._steps = 0

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
        room = NEAR_SHARE if self._on_device else 1.0 / float(coefficient)
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
            self._scale(range(len(self._parameters)), list(scales_P.unbind()))
            self._held_back, self.large = (scales_P < 1.0).sum(), (shares_P > large_P).sum()
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
        pairs = zip(values, self._sizes, strict=True)
        return self._shares_P.new_tensor([value for value, size in pairs for _ in range(size)])

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


class StepSizeBound:
    """Keeps lr·√numel ≤ ``max_ratio`` · ‖W‖ for Adam and its relatives, and the real update too.

    The tensors for which the step would be larger have their update scaled by the same factor at
    every step, as if their learning rate were smaller. So the bound does not depend on how well
    the gradients of the moment agree.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        *,
        on_device: bool,
        large_ratio: float = math.inf,
    ) -> None:
        self.large: int | Tensor = 0
        self._large_ratio = large_ratio
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._weights = WeightNorms(parameters)
        self._group_of = _group_numbers(optimizer, parameters)
        self._roots = [math.sqrt(real_numel(p)) for p in parameters]
        self._shrinker = UpdateShrinker(parameters, on_device=on_device)
        self._norms: list[float] = []
        self._potentials: list[float] = []  # expected ratio per unit of learning rate
        self._peaks: list[float] = []
        self._max_ratio = math.inf
        self._scales: list[float] = []
        self._steps = 0

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
        self._max_ratio = max_ratio
        self._steps += 1
        near = NEAR_SHARE * max_ratio if self._steps > FIRST_STEPS else 0.0
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
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

    def after_step(self) -> int | Tensor:
        """Scale the large updates down; returns how many there were."""
        return self._shrinker.shrink(self._max_ratio, self._scales)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""
        return {
            "weights": self._weights.state_dict(),
            "norms": list(self._norms),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._weights.load_state_dict(state["weights"])
        if len(state["norms"]) == len(self._roots):
            self._learn(state["norms"])
            self._steps = int(state["steps"])


class SampledBound:
    """Keeps the real update within the cap, whatever the optimizer; see :class:`UpdateForecast`."""

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        *,
        on_device: bool,
        large_ratio: float = math.inf,
    ) -> None:
        self.large: int | Tensor = 0
        self._large_ratio = large_ratio
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._shrinker = UpdateShrinker(parameters, on_device=on_device)
        self._sampler = UpdateSampler(parameters)
        self._forecast = UpdateForecast()
        self._max_ratio = math.inf
        self._rates: list[float] = []
        self._steps = 0

    def signal(self, norms: GradNorms) -> Tensor | None:
        """(P,) the expected updates at the last learning rate."""
        self._steps += 1
        if self._steps % REFRESH_EVERY == 0 and self._sampler.stale():
            self._sampler = UpdateSampler(self._parameters)
        return self._forecast.ratios(norms.values)

    def before_step(
        self, max_ratio: float, coefficient: float | Tensor, seen: Sequence[float]
    ) -> None:
        """Copy the tensors that may come near the cap; all of them where nothing is known."""
        self._max_ratio = max_ratio
        growth = self._rate_growth()
        near = NEAR_SHARE * max_ratio
        if seen:
            self._shrinker.copy([i for i, ratio in enumerate(seen) if not growth * ratio < near])
        else:
            self._shrinker.copy(list(range(len(self._parameters))))

    def _rate_growth(self) -> float:
        """The largest factor by which a group's learning rate grew since the last step.

        Never below 1: what was sampled may be an update that was shrunk, and says nothing of how
        large the next one is at a smaller rate.
        """
        rates = [float(group.get("lr", 1.0)) for group in self._optimizer.param_groups]
        before, self._rates = self._rates, rates
        if len(before) != len(rates):
            return math.inf
        growth = [
            now / old if old > 0.0 else (math.inf if now > 0.0 else 1.0)
            for now, old in zip(rates, before, strict=True)
        ]
        return max(1.0, *growth)

    def after_step(self) -> int | Tensor:
        """Shrink what went beyond the cap; returns how many tensors did."""
        capped = self._shrinker.shrink(self._max_ratio)
        self.large = self._shrinker.beyond(self._large_ratio)
        self._forecast.record(self._sampler.ratios())
        return capped

    def state_dict(self) -> dict[str, Any]:
        """Nothing: after a resume every tensor is copied once, with the same result."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start afresh."""


def _limit(group: Mapping[str, Any], max_ratio: float) -> float:
    rate, momentum = float(group["lr"]), group["momentum"]
    share = 1.0 - momentum if momentum < 1.0 else 0.0
    return share * max_ratio / rate if rate > 0.0 else math.inf


def _group_numbers(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[int]:
    """The number of the parameter group of each tensor."""
    numbers = {
        id(p): number
        for number, group in reversed(list(enumerate(optimizer.param_groups)))
        for p in group["params"]
    }
    return [numbers[id(p)] for p in parameters]


def _group_sizes(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[int]:
    """How many of the tensors, which are in the order of their groups, are in each group."""
    numbers = _group_numbers(optimizer, parameters)
    return [numbers.count(number) for number in range(len(optimizer.param_groups))]
