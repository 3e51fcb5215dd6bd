"""Two baselines that anybody would write in a minute."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.detection.peers.rules import Firing, RulePeer, non_finite
from benchmarks.detection.records import Alarm, StepFeatures
from lightning_gradguard.diagnose import Pathology

TENTH = 10


class NaNOnly(RulePeer):
    """Says so if the loss or a gradient is NaN or infinite."""

    name = "NaN only"

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """Once, not for every tensor."""
        for firing in non_finite(features):
            yield firing._replace(rule="not finite", layer="")
            return


class LossDidNotFall:
    """Compares the last tenth of the run with the first one, when the run is over.

    Attributes:
        name: How it is called in tables.
    """

    name = "loss did not fall"

    def __init__(self) -> None:
        self._losses: list[float] = []

    def observe(self, features: StepFeatures) -> list[Alarm]:
        """Keeps the loss."""
        self._losses.append(features.loss)
        return []

    def finish(self) -> list[Alarm]:
        """An alarm at the end, or none."""
        losses = self._losses
        count = max(len(losses) // TENTH, 1)
        if not losses or sum(losses[-count:]) < sum(losses[:count]):
            return []
        return [Alarm(len(losses), Pathology.STAGNATING.value)]
