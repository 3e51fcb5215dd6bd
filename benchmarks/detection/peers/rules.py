"""What the rule sets of others have in common: a rule begins to fire at a place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.detection.records import Alarm, StepFeatures, TensorFeatures
from lightning_gradguard.diagnose import Pathology

# A rule that has been silent for longer than this speaks up anew.
QUIET_STEPS = 16
_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)")


class Firing(NamedTuple):
    """One rule that fires at one place on this step."""

    rule: str
    cause: Pathology
    layer: str = ""


class RulePeer:
    """Turns rules that fire on many steps into one alarm per stretch of firing.

    Without that, a rule which fires on every step of a healthy run would count as a thousand false
    alarms, which is not how anybody meets it.

    Args:
        every: Steps between two checks. A rule is silent if it does not fire on a check.

    Attributes:
        name: How it is called in tables.
    """

    name = ""

    def __init__(self, every: int = 1) -> None:
        self.every = max(every, 1)
        self._last: dict[tuple[str, str], int] = {}

    def check(self, features: StepFeatures) -> Iterable[Firing]:
        """The rules that fire on this step, the most telling ones first."""
        raise NotImplementedError

    def observe(self, features: StepFeatures) -> list[Alarm]:
        """Takes in one step; returns the rules that begin to fire."""
        self.see(features)
        if features.step % self.every:
            return []
        return self._begin(features.step, self.check(features))

    def see(self, features: StepFeatures) -> None:
        """Takes in what the rules need of the steps between two checks."""

    def finish(self) -> list[Alarm]:
        """Nothing is left to say."""
        return []

    def _begin(self, step: int, firings: Iterable[Firing]) -> list[Alarm]:
        gap = max(QUIET_STEPS, self.every)
        alarms = []
        for rule, cause, layer in firings:
            last = self._last.get((rule, layer))
            if last is None or step - last > gap:
                alarms.append(Alarm(step, cause.value, layer))
            self._last[rule, layer] = step
        return alarms


def vanishing(tensor: str) -> Pathology:
    """The closer of the two ways to vanish: in recurrent weights it is through time."""
    recurrent = _RECURRENT.search(tensor)
    return Pathology.VANISHING_IN_TIME if recurrent else Pathology.VANISHING_IN_DEPTH


def non_finite(features: StepFeatures) -> Iterator[Firing]:
    """A loss or a gradient that is NaN or infinite."""
    if not math.isfinite(features.loss):
        yield Firing("loss is not finite", Pathology.NON_FINITE)
    for tensor in features.tensors:
        if not tensor.finite:
            yield Firing("gradient is not finite", Pathology.NON_FINITE, tensor.name)


def weights(features: StepFeatures) -> list[TensorFeatures]:
    """The weight matrices that have a gradient, in forward order."""
    return [t for t in features.tensors if t.is_weight and not math.isnan(t.grad_norm)]


def total_norm(tensors: Sequence[TensorFeatures]) -> float:
    """Norm of the whole gradient; NaN if any of it is not finite."""
    if not all(tensor.finite for tensor in tensors):
        return math.nan
    known = (t.grad_norm for t in tensors if not math.isnan(t.grad_norm))
    return math.sqrt(math.fsum(norm * norm for norm in known))


def update_ratio(tensor: TensorFeatures) -> float:
    """Mean |update| to mean |weight|; NaN where there was no update, or nothing to relate it to."""
    if not tensor.mean_abs_weight > 0.0:
        return math.nan
    return tensor.mean_abs_update / tensor.mean_abs_weight
