"""AutoTrainer's rules (ICSE 2021), re-implemented from its paper and published parameters.

It looks every three epochs, which are 60 steps on the digits, and 60 steps on all other tasks too.
Where a task has no accuracy, the relative fall of the loss stands in for the rise of the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from benchmarks.detection.peers.rules import Firing, RulePeer, non_finite, vanishing, weights
from benchmarks.detection.records import StepFeatures
from lightning_gradguard.diagnose import Pathology

CHECK_STEPS = 60
VANISHING_RATIO, VANISHING_NORM = 1e-3, 1e-4  # first to last layer; first layer
EXPLODING_RATIO = 70.0  # first to last layer
LARGE_LOSS = 1e3
ZERO_SHARE = 0.7  # of all gradient elements
SWING, SWING_SHARE = 0.03, 0.2  # of the accuracy; of the checks
RISE = 0.01  # of the accuracy from check to check, below which learning is slow
ENOUGH_ACCURACY = 0.6
PATIENCE = 0.3  # share of the budget before accuracy is judged


class AutoTrainer(RulePeer):
    """All rules on one run.

    Args:
        steps: Budget of the run.
        gate: Whether to report gradients only if the accuracy is low or does not rise.
    """

    def __init__(self, steps: int, gate: bool) -> None:
        super().__init__(CHECK_STEPS)
        self._patience = PATIENCE * steps
        self.name = "AutoTrainer" if gate else "AutoTrainer without its gate"
        self._gate = gate
        self._accuracies: list[float] = []
        self._losses: list[float] = []

    def see(self, features: StepFeatures) -> None:
        """Keeps every accuracy that was measured."""
        if features.accuracy is not None:
            self._accuracies.append(features.accuracy)

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """Only one of dying ReLU, explosion, vanishing and slow learning, in this order."""
        self._losses.append(features.loss)
        yield from non_finite(features)
        if features.loss >= LARGE_LOSS:
            yield Firing("large loss", Pathology.EXPLODING)
        late = features.step >= self._patience
        flat = late and self._does_not_rise()
        low = late and self._is_low()
        slow = flat and (low or not self._accuracies)
        if not self._gate or flat or low:
            yield from _gradient_rule(features) or (_SLOW if slow else ())
        elif late and oscillates(self._accuracies):
            yield Firing("oscillating accuracy", Pathology.OSCILLATING)

    def _is_low(self) -> bool:
        return bool(self._accuracies) and max(self._accuracies) < ENOUGH_ACCURACY

    def _does_not_rise(self) -> bool:
        if self._accuracies:
            return largest_rise(self._accuracies) < RISE
        falls = [
            (before - after) / abs(before) if before else 0.0
            for before, after in pairwise(self._losses)
        ]
        return max(falls, default=0.0) < RISE


_SLOW = (Firing("slow learning", Pathology.STAGNATING),)


def _gradient_rule(features: StepFeatures) -> tuple[Firing, ...]:
    known = weights(features)
    if not known or not all(tensor.finite for tensor in known):
        return ()
    first, last = known[0], known[-1]
    zero_share = math.fsum(tensor.zero_share for tensor in known) / len(known)
    ratio = first.grad_norm / last.grad_norm if last.grad_norm > 0.0 else math.nan
    if zero_share >= ZERO_SHARE:
        return (Firing("dying relu", Pathology.DEAD_UNITS),)
    if ratio > EXPLODING_RATIO:
        return (Firing("exploding gradient", Pathology.EXPLODING, first.name),)
    if ratio < VANISHING_RATIO and first.grad_norm < VANISHING_NORM:
        return (Firing("vanishing gradient", vanishing(first.name), first.name),)
    return ()


def largest_rise(values: Sequence[float]) -> float:
    """The largest step up from one value to the next."""
    return max((b - a for a, b in pairwise(values)), default=0.0)


def oscillates(values: Sequence[float]) -> bool:
    """Whether the n-th peak is far above the n-th valley for a large share of the values."""
    peaks, valleys = [], []
    for before, value, after in zip(values, values[1:], values[2:], strict=False):
        if value >= before and value >= after:
            peaks.append(value)
        if value <= before and value <= after:
            valleys.append(value)
    swings = sum(peak - valley >= SWING for peak, valley in zip(peaks, valleys, strict=False))
    return len(values) >= 3 and swings >= SWING_SHARE * len(values)
