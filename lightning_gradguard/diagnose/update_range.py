"""The detector of weights that move far too fast or far too slowly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.findings import Pathology, Severity
from lightning_gradguard.diagnose.layer_detector import LayerDetector, consequence
from lightning_gradguard.diagnose.layer_watch import Course, Look, Patience
from lightning_gradguard.diagnose.places import in_words, module_of
from lightning_gradguard.readings import Inspection, ParameterReading

# Places of the model as a whole; no module has such a path.
_FAST, _SLOW = "/fast", "/slow"
# Stands for the strength of what is infinitely strong: a state has finite numbers only.
_LARGEST = 1e30


class UpdateRangeDetector(LayerDetector):
    """Updates whose size relative to the weights is out of all proportion.

    Three symptoms, of the update ratios of the weight matrices:

    - one is `update_factor` above or below their median, found at its module: `WARNING` beside a
      bad loss, and without one where its own learning rate is as far below the others' and too
      small for it to get anywhere in the whole run;
    - the median was above `fast_update` in `layer_persistence` inspections in a row, be it in the
      first steps: `WARNING` as soon as the loss is known to be bad;
    - the median is so small that all steps of the run together could replace only `slow_reach` of
      the weights (or below `slow_update`, where its length is not known): `WARNING` beside a loss
      that is no better than early for `slow_update_span` steps, never `INFO`, as most runs end
      so. Not while the learning rate rises, nor where the updates became small late in the run.
    """

    pathology = Pathology.UPDATE_OUT_OF_RANGE

    def _looks(self, inspection: Inspection, observation: Observation) -> Iterable[Look]:
        weights = [r for r in inspection.parameters if _was_measured(r)]
        if any(r.lr > 0.0 for r in weights):
            # What a group with a rate of 0 holds still says nothing of the rate of the others.
            weights = [r for r in weights if r.lr != 0.0]
        if not weights:
            return
        typical = median(r.update_ratio for r in weights)
        yield self._look_fast(typical)
        # Weights that were blown up at first make every later update look small.
        if not self._watch.ever_had(_FAST):
            yield from self._look_slow(typical, weights, observation.model.planned_steps)
        moving = [r for r in weights if r.update_ratio > 0.0]
        if typical > 0.0:
            reach = self._reach(observation.model.planned_steps)
            rate = _median_rate(moving)
            for reading in _most_extreme(moving, typical):
                slower = reading.lr * self._thresholds.update_factor < rate
                left_behind = slower and reading.update_ratio < reach
                if left_behind or len(moving) >= self._thresholds.ratio_weights:
                    yield self._look_at(reading, typical, left_behind=left_behind)

    def _severity(self, look: Look, course: Course) -> Severity | None:
        if look.place == _FAST:
            if course.bad:
                return Severity.WARNING
            return Severity.INFO if course.known else None
        if look.place == _SLOW:
            severe = course.harmful and not course.worse and not course.recovering
            return Severity.WARNING if severe and course.since <= look.evidence["latest"] else None
        if look.evidence["left_behind"]:
            return Severity.WARNING
        return super()._severity(look, course)

    def _message(self, look: Look, course: Course, severity: Severity) -> str:
        follows = consequence(course, severity)
        if look.evidence.get("left_behind"):
            follows = "so all steps of the run together will hardly change them"
        if look.place == _FAST:
            return (
                f"A single step moved the weights of the model by up to {course.peak:.2g} times "
                "their size (median over its weight matrices), far more than training bears, "
                f"{follows}."
            )
        if look.place == _SLOW:
            follows = "so it cannot get anywhere, and the loss is no better than early in training"
        return f"{look.words}, {follows}."

    def _look_fast(self, typical: float) -> Look:
        t, watch = self._thresholds, self._watch
        patience = Patience(t.layer_persistence, 0)
        # Weights that grow make the ratio fall, but they do not come back: only the loss can clear
        # what has lasted.
        pending = watch.loss_is_bad or not watch.knows_loss
        return Look(
            place=_FAST,
            where="model",
            symptom=typical >= t.fast_update or (pending and watch.has_lasted(_FAST, patience)),
            patience=patience,
            strength=min(typical, _LARGEST),
            evidence={"update_ratio": typical},
        )

    def _look_slow(
        self, typical: float, weights: Sequence[ParameterReading], planned: int | None
    ) -> Iterable[Look]:
        t = self._thresholds
        rate = _median_rate(weights)
        if typical == 0.0 and rate != 0.0:
            return  # lost in rounding, which is not the learning rate's fault
        latest = max(t.slow_update_span, planned // 2) if planned else t.slow_update_span
        pace = typical if math.isnan(rate) else rate
        yield Look(
            place=_SLOW,
            where="model",
            symptom=typical < self._reach(planned),
            patience=Patience(t.layer_persistence, t.slow_update_span),
            strength=min(1.0 / pace, _LARGEST) if pace > 0.0 else _LARGEST,
            words=f"A step changes the weights of the model by {typical:.1e} of their size (median "
            "over its weight matrices)",
            evidence={"update_ratio": typical, "lr": rate, "latest": float(latest)},
        )

    def _reach(self, planned: int | None) -> float:
        """Update ratio below which a whole run hardly changes a weight."""
        t = self._thresholds
        return t.slow_reach / planned if planned else t.slow_update

    def _look_at(self, reading: ParameterReading, typical: float, *, left_behind: bool) -> Look:
        apart = abs(math.log(reading.update_ratio) - math.log(typical))
        where = module_of(reading.name)
        times = f"{math.exp(min(apart, 700.0)):.0e} times"
        side = "more" if reading.update_ratio > typical else "less"
        return Look(
            place=where,
            where=where,
            symptom=apart > math.log(self._thresholds.update_factor),
            patience=self._usual,
            strength=apart,
            words=f"The weights of {in_words(where)} move {times} {side} per step than the median "
            "layer's",
            evidence={
                "update_ratio": reading.update_ratio,
                "median": typical,
                "left_behind": float(left_behind),
            },
        )


def _median_rate(weights: Sequence[ParameterReading]) -> float:
    rates = [reading.lr for reading in weights if 0.0 <= reading.lr < math.inf]
    return median(rates) if rates else math.nan


def _was_measured(reading: ParameterReading) -> bool:
    return (
        reading.dims >= 2
        and reading.requires_grad
        and reading.in_optimizer
        and 0.0 <= reading.update_ratio < math.inf
        and not math.isnan(reading.grad_norm)  # a weight without a gradient does not move
    )


def _most_extreme(weights: Sequence[ParameterReading], typical: float) -> list[ParameterReading]:
    """Returns one weight per module: the furthest from the median."""
    furthest: dict[str, tuple[float, ParameterReading]] = {}
    for reading in weights:
        apart = abs(math.log(reading.update_ratio) - math.log(typical))
        if apart > furthest.get(reading.module, (-1.0, reading))[0]:
            furthest[reading.module] = apart, reading
    return [reading for _, reading in furthest.values()]
