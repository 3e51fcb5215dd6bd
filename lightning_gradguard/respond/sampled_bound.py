"""The cap for any optimizer: sample the last updates, and copy what may come near.

Shape legend: ``P`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.measure import GradNorms
from lightning_gradguard.measure.updates import UpdateForecast, UpdateSampler
from lightning_gradguard.respond.shrinking_bound import ShrinkingBound
from lightning_gradguard.respond.weight_norms import NEAR_SHARE, REFRESH_EVERY


class SampledBound(ShrinkingBound):
    """Keeps the real update within the cap, whatever the optimizer; see :class:`UpdateForecast`."""

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
        self._sampler = UpdateSampler(parameters)
        self._forecast = UpdateForecast()
        self._rates: list[float] = []
        self._resumed = False
        self._allowances_P: Tensor | None = None

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
        if self._resumed:  # the sample of the weights as the last step has left them
            self._resumed = False
            self._sampler.ratios()
        self._max_ratio = max_ratio
        growth = self._rate_growth()
        near = NEAR_SHARE * max_ratio
        if math.isinf(max_ratio):  # what is not copied is only known by its sample
            self.large = sum(growth * ratio > self._large_ratio for ratio in seen)
            self._shrinker.copy([])
        elif seen:
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
        if math.isfinite(self._max_ratio):
            self.large = self._shrinker.beyond(self._large_ratio)
        ratios = self._sampler.ratios()
        if ratios is not None and self._allowances:
            if self._allowances_P is None:  # once: lists become tensors by a copy that waits
                self._allowances_P = ratios.new_tensor(self._allowances)
            ratios = ratios / self._allowances_P
        # The next update may be as large again, and the cap wider by then.
        self._forecast.record(None if ratios is None else self._shrinker.unshrunk(ratios))
        return capped

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""
        return {
            "forecast": self._forecast.state_dict(),
            "rates": list(self._rates),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        known = state.get("forecast", {}).get("norms")
        if known is None or len(known) != len(self._parameters):
            return
        self._forecast.load_state_dict(state["forecast"])
        self._rates = [float(rate) for rate in state["rates"]]
        self._steps = int(state["steps"])
        self._resumed = True
