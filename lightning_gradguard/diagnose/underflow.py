"""The detector of gradients that are too small for the numbers they are computed in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.findings import Pathology, Severity
from lightning_gradguard.diagnose.layer_detector import LayerDetector
from lightning_gradguard.diagnose.layer_watch import Course, Look
from lightning_gradguard.diagnose.places import in_words, module_of
from lightning_gradguard.readings import Inspection, ParameterReading

# Elements of this root mean square are near the end of float32, so no narrower numbers are to
# blame: the gradient has vanished, and that is what is to be said.
_END_OF_FLOAT32 = 1e-30
_ALL, _PART = "all", "part"


class UnderflowDetector(LayerDetector):
    """Gradient elements that are zero or subnormal only because of the working precision.

    The symptom is a weight of whose gradient `underflow_share` is zero or subnormal, and
    `underflow_tiny` of what is not zero is subnormal, as sparse gradients are not; found at the
    module with the largest share. See `LayerDetector` for its severity. A model in 16 bit in which
    the gradient of every weight is exactly zero though the loss is not, is a `WARNING` by itself.

    The only detector whose findings change if the loss is scaled, as underflow does.
    """

    pathology = Pathology.UNDERFLOW

    def _looks(self, inspection: Inspection, observation: Observation) -> Iterable[Look]:
        weights = [r for r in inspection.parameters if _has_gradient(r)]
        if not weights:
            return
        yield self._look_at_all(weights, observation)
        if any(r.grad_norm > 0.0 for r in weights):
            yield self._look_at_part(weights)

    def _severity(self, look: Look, course: Course) -> Severity | None:
        return Severity.WARNING if look.place == _ALL else super()._severity(look, course)

    def _message(self, look: Look, course: Course, severity: Severity) -> str:
        if look.place == _ALL:
            return f"{look.words}, so nothing is trained though the loss is not zero."
        return super()._message(look, course, severity)

    def _look_at_all(self, weights: Sequence[ParameterReading], observation: Observation) -> Look:
        loss = observation.loss
        has_loss = loss is not None and math.isfinite(loss) and loss != 0.0
        narrow = observation.model.precision.startswith(("16", "fp16"))
        return Look(
            place=_ALL,
            where="model",
            symptom=narrow and has_loss and all(r.grad_norm == 0.0 for r in weights),
            patience=self._usual,
            words=f"The gradient is exactly zero in all {len(weights)} weights of the model, below "
            "what 16 bit can hold",
            evidence={"weights": float(len(weights))},
        )

    def _look_at_part(self, weights: Sequence[ParameterReading]) -> Look:
        lost = {r.name: r for r in weights if self._is_lost(r)}
        worst = max(lost.values() or weights, key=_lost_share)
        where = module_of(worst.name)
        return Look(
            place=_PART,
            where=where,
            symptom=bool(lost),
            patience=self._usual,
            strength=_lost_share(worst),
            words=f"Of the gradient of {in_words(where)}, {_lost_share(worst):.0%} is zero or too "
            "small for the working precision (at least "
            f"{self._thresholds.underflow_share:.0%} in {len(lost)} of {len(weights)} weights)",
            evidence={
                "zero_share": worst.zero_share,
                "tiny_share": worst.tiny_share,
                "weights": float(len(weights)),
                "weights_concerned": float(len(lost)),
            },
        )

    def _is_lost(self, reading: ParameterReading) -> bool:
        t, nonzero = self._thresholds, 1.0 - reading.zero_share
        size = reading.grad_norm / math.sqrt(max(reading.elements, 1))
        return (
            size > _END_OF_FLOAT32
            and _lost_share(reading) >= t.underflow_share
            and nonzero > 0.0
            and reading.tiny_share >= t.underflow_tiny * nonzero
        )


def _has_gradient(reading: ParameterReading) -> bool:
    return (
        reading.dims >= 2
        and 0.0 <= reading.grad_norm < math.inf
        and 0.0 <= reading.zero_share <= 1.0
        and 0.0 <= reading.tiny_share <= 1.0
    )


def _lost_share(reading: ParameterReading) -> float:
    return min(reading.zero_share + reading.tiny_share, 1.0)
