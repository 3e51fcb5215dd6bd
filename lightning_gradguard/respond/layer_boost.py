"""Larger updates for the layers that a gradient which vanishes through depth leaves behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_gradguard._validation import check_number
from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.readings import Inspection
from lightning_gradguard.respond.actions import Action, ActionKind

# While one of these is open updates are too large already.
_TROUBLE = {
    Pathology.NON_FINITE: "has a loss or gradient that is not finite",
    Pathology.EXPLODING: "is exploding",
    Pathology.DIVERGING: "is diverging",
    Pathology.LOSS_SPIKE: "has a spike of its loss",
}
# A boost below this is over: on its way down it would else last forever.
_LEAST = 1.01
# Growth of the largest boost that is worth another line.
_NOTABLE = 1.25


@dataclass(frozen=True)
class LayerBoost:
    """Enlarge the updates of layers that get too little while the gradient vanishes through depth.

    Once :attr:`~lightning_gradguard.diagnose.Pathology.VANISHING_IN_DEPTH` is found and does harm,
    each weight whose relative update is below the median one has its updates multiplied by what it
    lacks, up to ``max_boost``; biases and scales follow the weights of their module. Boosts change
    at each look at the layers, by at most ``max_change``, and go back to 1 once the finding has
    healed, or at once when the run explodes, diverges, spikes or is not finite. No boost moves a
    tensor beyond the cap on updates. Works for any optimizer: its step is taken, and then
    prolonged, weight decay included.

    It is a mild measure: where the gradient has lost many orders of magnitude no bounded factor
    brings it back, and optimizers that normalize gradients leave little to enlarge. In trials with
    sigmoid and tanh networks of 8 to 20 layers it changed the final loss by no more than the seed.

    Without that finding nothing is done, and no copy of a weight is held. It is left out where
    parameters are sharded, as each process sees its own shards only.

    Args:
        max_boost: Largest factor on an update. Default 4, about half a decade: what a layer lacks
            by orders of magnitude is for its initialization or a shortcut to mend.
        max_change: Largest factor by which a boost changes from one look to the next. Default 1.5.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> LayerBoost(max_boost=8.0).max_change
        1.5
        >>> LayerBoost(max_boost=0.5)
        Traceback (most recent call last):
        ...
        ValueError: max_boost must be a number > 1 and < inf, got 0.5
    """

    max_boost: float = 4.0
    max_change: float = 1.5

    def __post_init__(self) -> None:
        check_number("max_boost", self.max_boost, above=1.0, below=math.inf)
        check_number("max_change", self.max_change, above=1.0, below=math.inf)


def lacking(
    inspection: Inspection, in_force: Mapping[str, float], max_boost: float
) -> dict[str, float]:
    """The factor by which each parameter lags behind the median weight, from 1 to ``max_boost``.

    Args:
        inspection: A look at the layers.
        in_force: Boosts that its updates have in them already, by the names of the parameters.
        max_boost: Largest factor.

    Example:
        >>> from lightning_gradguard.readings import ParameterReading
        >>> ratios = {"a.weight": 1e-4, "b.weight": 1e-3, "c.weight": 2e-3}
        >>> readings = tuple(ParameterReading(n, update_ratio=r) for n, r in ratios.items())
        >>> lacking(Inspection(0, readings), {}, max_boost=4.0)
        {'a.weight': 4.0, 'b.weight': 1.0, 'c.weight': 1.0}
    """
    moved = [p for p in inspection.parameters if p.requires_grad and math.isfinite(p.update_ratio)]
    own = {p.name: p.update_ratio / in_force.get(p.name, 1.0) for p in moved if p.dims >= 2}
    typical = median(own.values()) if own else 0.0
    if typical == 0.0:
        return {}
    lacks: dict[str, float] = {}
    of_module: dict[str, float] = {}
    for reading in moved:
        ratio = own.get(reading.name)
        if ratio is None:
            continue
        # An update of 0 may have been lost in rounding.
        lack = min(max(typical / ratio, 1.0), max_boost) if ratio > 0.0 else max_boost
        lacks[reading.name] = lack
        of_module[reading.module] = min(of_module.get(reading.module, math.inf), lack)
    others = {p.name: of_module[p.module] for p in moved if p.dims < 2 and p.module in of_module}
    return lacks | others


class LayerBoostState:
    """Which parameters are boosted by how much, from findings and inspections; plain values.

    Args:
        settings: The bounds.

    Attributes:
        boosts: Factors above 1, by the names of the parameters.
    """

    def __init__(self, settings: LayerBoost) -> None:
        self.settings = settings
        self.boosts: dict[str, float] = {}
        self._told = 1.0
        # Inspections come late from a device: what was in force from which step on.
        self._past: list[tuple[int, dict[str, float]]] = [(0, {})]

    def observe(
        self, step: int, findings: Sequence[Finding], inspection: Inspection | None
    ) -> list[Action]:
        """Take in one step; returns what changes because of it.

        Args:
            step: The next step, from which on a change is in force.
            findings: Those that are open.
            inspection: The look at the layers that has come with it, if any.
        """
        serious = [f.pathology for f in findings if f.severity >= Severity.WARNING]
        trouble = next((_TROUBLE[p] for p in serious if p in _TROUBLE), "")
        if trouble:
            return self._take_back(step, trouble) if self.boosts else []
        wanted = Pathology.VANISHING_IN_DEPTH in serious
        if inspection is None or not (wanted or self.boosts):
            return []
        lacks: dict[str, float] = {}
        if wanted:
            in_force = self._in_force(inspection.step)
            lacks = lacking(inspection, in_force, self.settings.max_boost)
        names = [*self.boosts, *(name for name in lacks if name not in self.boosts)]
        moved = {name: self._toward(name, lacks.get(name, 1.0)) for name in names}
        self._set(step, {name: boost for name, boost in moved.items() if boost >= _LEAST})
        return self._news(step)

    def _toward(self, name: str, target: float) -> float:
        before, most = self.boosts.get(name, 1.0), self.settings.max_change
        return min(max(target, before / most, 1.0), before * most)

    def _set(self, step: int, boosts: dict[str, float]) -> None:
        if boosts != self.boosts:
            self.boosts = boosts
            self._past.append((step, dict(boosts)))

    def _in_force(self, step: int) -> dict[str, float]:
        while len(self._past) > 1 and self._past[1][0] <= step:
            del self._past[0]
        return self._past[0][1]

    def _take_back(self, step: int, trouble: str) -> list[Action]:
        self._set(step, {})
        self._told = 1.0
        message = f"Updates of no layer are enlarged any more, because the run {trouble}."
        return [Action(ActionKind.BOOST, step, message, {"largest_boost": 1.0})]

    def _news(self, step: int) -> list[Action]:
        """An action where the boosts have begun, ended or grown much."""
        largest = max(self.boosts.values(), default=1.0)
        ended = largest == 1.0 and self._told > 1.0
        if largest < _NOTABLE * self._told and not ended:
            return []
        self._told = largest
        if ended:
            message = (
                "Updates of no layer are enlarged any more, because the gradient no longer "
                "vanishes through depth."
            )
        else:
            first = max(self.boosts, key=self.boosts.__getitem__)
            message = (
                f"Updates of {len(self.boosts)} parameters are enlarged, that of {first!r} "
                f"{largest:.3g} times, because the gradient vanishes through depth."
            )
        return [Action(ActionKind.BOOST, step, message, {"largest_boost": largest})]

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "boosts": dict(self.boosts),
            "told": self._told,
            "past": [[step, dict(boosts)] for step, boosts in self._past],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.boosts = dict(state["boosts"])
        self._told = float(state["told"])
        self._past = [(int(step), dict(boosts)) for step, boosts in state["past"]]
