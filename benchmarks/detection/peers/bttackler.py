"""BTTackler's quality indicators of gradients (KDD 2024), re-implemented from their description.

Its exemption of the best tenth of all trials of a search has no counterpart in a single run.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.detection.peers.rules import Firing, RulePeer, non_finite, vanishing, weights
from benchmarks.detection.records import StepFeatures
from lightning_gradguard.diagnose import Pathology

VANISHING, EXPLODING = 1e-5, 1e4  # of median |gradient|
VANISHING_QUOTIENT, EXPLODING_QUOTIENT = 1e-4, 1e3  # of a layer to the next
ZERO_SHARE = 0.5  # of a gradient


class BTTackler(RulePeer):
    """All rules on one run."""

    name = "BTTackler"

    def check(self, features: StepFeatures) -> Iterator[Firing]:
        """NaN, then zeros and size of each weight's gradient, alone and beside the next one's."""
        yield from non_finite(features)
        known = weights(features)
        for number, tensor in enumerate(known):
            own = tensor.median_abs_grad
            after = known[number + 1].median_abs_grad if number + 1 < len(known) else 0.0
            quotient = own / after if after > 0.0 else 1.0
            if tensor.zero_share > ZERO_SHARE:
                yield Firing("dead relu", Pathology.DEAD_UNITS, tensor.name)
            elif own < VANISHING or quotient < VANISHING_QUOTIENT:
                yield Firing("vanishing gradient", vanishing(tensor.name), tensor.name)
            elif own > EXPLODING or quotient > EXPLODING_QUOTIENT:
                yield Firing("exploding gradient", Pathology.EXPLODING, tensor.name)
