"""The detector of a gradient that vanishes on its way back through the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.findings import Pathology
from lightning_gradguard.diagnose.layer_detector import LayerDetector
from lightning_gradguard.diagnose.layer_watch import Look
from lightning_gradguard.diagnose.places import in_words, module_of
from lightning_gradguard.readings import Inspection, ParameterReading

# Relative gradients, in nats, of layers whose gradient is exactly zero: below all that are not.
_NOTHING = -1000.0


class VanishingInDepthDetector(LayerDetector):
    """A gradient that loses orders of magnitude on its way to the first layers.

    The symptom is an attenuation by `depth_factor` from the last weight to the first, even at the
    optimistic end of the slope's confidence interval; or, where only a part of the layers is
    affected and no straight line fits, a share `depth_block` of the layers side by side that all
    get less than a thousandth of the relative gradient of the layers after them.

    It is found at the first weight that gets less than a thousandth of the largest relative
    gradient. See `LayerDetector` for its severity.
    """

    pathology = Pathology.VANISHING_IN_DEPTH

    def _looks(self, inspection: Inspection, observation: Observation) -> Iterable[Look]:
        weights = [r for r in inspection.parameters if _has_gradient(r)]
        levels = [_level(reading) for reading in weights]
        if len(weights) < self._thresholds.depth_layers or max(levels) == _NOTHING:
            return
        layers, error = inspection.depth_layers, inspection.depth_error
        sloped = -(inspection.depth_slope + error) * (layers - 1)
        if not (math.isfinite(sloped) and layers >= self._thresholds.depth_layers):
            sloped = 0.0
        stepped = self._lost_in_a_block(levels)
        least = math.log(self._thresholds.depth_factor)
        lost = max(sloped, stepped)
        by_slope = sloped > least
        place = module_of(self._first_starved(weights, levels).name)
        lost = min(lost, -_NOTHING)
        yield Look(
            place="depth",
            where=place,
            symptom=lost > least,
            patience=self._usual,
            strength=max(lost, 0.0),
            error=error * (layers - 1) if by_slope else 0.0,
            words=f"The gradient vanishes through depth: of {len(weights)} weights, that of "
            f"{in_words(place)} gets {_share(lost)} of what the last ones get",
            evidence={
                "slope": inspection.depth_slope,
                "error": error,
                "layers": float(layers or len(weights)),
                "attenuation": lost,
                "first_to_last": math.exp(max(min(levels[0] - levels[-1], 700.0), -700.0)),
            },
        )

    def _lost_in_a_block(self, levels: Sequence[float]) -> float:
        """Nats that separate some layers side by side from the layers after them."""
        size = max(2, math.ceil(self._thresholds.depth_block * len(levels)))
        # At least two after them: a single large last layer is no standard.
        ends = range(size, len(levels) - 1)
        return max(
            (median(levels[end:]) - max(levels[end - size : end]) for end in ends), default=0.0
        )

    def _first_starved(
        self, weights: Sequence[ParameterReading], levels: Sequence[float]
    ) -> ParameterReading:
        bound = max(levels) - math.log(self._thresholds.depth_factor)
        for reading, level in zip(weights, levels, strict=True):
            if level < bound:
                return reading
        return weights[min(range(len(levels)), key=levels.__getitem__)]


def _has_gradient(reading: ParameterReading) -> bool:
    return (
        reading.dims >= 2
        and reading.requires_grad
        and 0.0 <= reading.grad_norm < math.inf
        and 0.0 < reading.weight_norm < math.inf
    )


def _level(reading: ParameterReading) -> float:
    if reading.grad_norm == 0.0:
        return _NOTHING
    return math.log(reading.grad_norm) - math.log(reading.weight_norm)


def _share(nats: float) -> str:
    decades = nats / math.log(10.0)
    return f"1e-{decades:.0f}" if decades < 300.0 else "nothing"
