"""The half of the guard that is plain numbers: diagnose -> respond -> record.

No tensors and no hooks here: one step's numbers go in, the bounds of the next step come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_gradguard.diagnose import (
    Diagnosis,
    Finding,
    Observation,
    Thresholds,
    by_cause,
    default_detectors,
    layer_detectors,
    time_detectors,
)
from lightning_gradguard.readings import ModelFacts, Seen
from lightning_gradguard.record import Recorder, StepRecord
from lightning_gradguard.respond import ActionKind
from lightning_gradguard.respond.ladder import Ladder, StepPlan
from lightning_gradguard.respond.rollback import do_damage

_NOTHING = Seen()
# Steps in a row that a gradient scaler drops while it looks for its scale. It starts at 2^16 and
# halves it each time: if this many do not do, the numbers are at fault and not the scale.
_SCALER_SKIPS = 24


@dataclass(frozen=True)
class Outcome:
    """What became of one step.

    Args:
        number: Number of the step.
        plan: The bounds it was held to.
        total_norm: Gradient norm before clipping.
        loss: Loss, if known.
        coefficient: What the gradient was multiplied by; 0 if the step was dropped.
        capped: Tensors that were held back by the cap.
        large: Tensors whose update would have been large without it.
        left_to_scaler: Whether a gradient scaler is in charge of steps that are not finite.
        segment_norms: Norm of each segment that is clipped by itself, before clipping.
        weights_broken: Whether NaN or Inf was found in the weights.
    """

    number: int
    plan: StepPlan
    total_norm: float = math.nan
    loss: float | None = None
    coefficient: float = 1.0
    capped: int = 0
    large: int = 0
    left_to_scaler: bool = False
    segment_norms: tuple[float, ...] = ()
    weights_broken: bool = False

    @property
    def finite(self) -> bool:
        """Whether gradient norm and loss are, as far as they are known."""
        known = self.loss is None or math.isfinite(self.loss)
        return known and math.isfinite(self.total_norm)

    def seen(
        self,
        total_norm: float,
        loss: float,
        coefficient: float,
        segment_norms: tuple[float, ...] = (),
    ) -> Outcome:
        """The same step with what was read; a loss that was never given stays unknown."""
        return replace(
            self,
            total_norm=total_norm,
            loss=None if self.loss is None else loss,
            coefficient=coefficient,
            segment_norms=segment_norms,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        norms = list(self.segment_norms)
        return {**asdict(self), "plan": self.plan.to_dict(), "segment_norms": norms}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of :meth:`to_dict`."""
        norms = tuple(values.get("segment_norms", ()))
        plan = StepPlan.from_dict(values["plan"])
        return cls(**{**values, "plan": plan, "segment_norms": norms})


class Pipeline:
    """Takes in one step after the other.

    Args:
        ladder: Decides on the bounds; ``None`` to observe only.
        thresholds: What counts as a finding.
        recorder: Where everything is recorded.

    Attributes:
        tensors: How many tensors the step under way can move.
        loss_sign: -1 if the optimizer maximizes, 0 if only some of its groups do.
        model: What is known about the model, by which remedies are chosen.
        restorable: Step to which weights can be put back; ``None`` if to none.
        wants_exact: Whether an exact measurement through time would help to explain what goes on.
    """

    def __init__(
        self,
        ladder: Ladder | None,
        thresholds: Thresholds | None,
        recorder: Recorder,
    ) -> None:
        self.ladder = ladder
        self.recorder = recorder
        self.tensors = 1
        self.loss_sign = 1
        self.model = ModelFacts()
        self.restorable: int | None = None
        self.wants_exact = False
        self._scaler_skips = 0
        self._time_detectors = time_detectors(thresholds)
        self._diagnosis = Diagnosis(
            default_detectors(thresholds), [*layer_detectors(thresholds), *self._time_detectors]
        )
        self._counts = dict.fromkeys(
            ("steps", "skipped_steps", "clipped_steps", "capped_steps", "findings", "rollbacks"), 0
        )

    def follow(self, step: int, rates: Sequence[float]) -> None:
        """Take in the learning rates of the coming step, as the schedule sets them."""
        for action in self.ladder.follow(step, rates) if self.ladder else ():
            self.recorder.action(action)

    @property
    def plan(self) -> StepPlan:
        """The bounds of the next step."""
        return self.ladder.plan() if self.ladder else StepPlan()

    @property
    def counts(self) -> dict[str, int]:
        """Running counts: steps; skipped, clipped and capped ones; findings; rollbacks."""
        return dict(self._counts)

    def copy_due(self, step: int, newest: int | None) -> bool:
        """Whether the weights are to be copied before the update of ``step``, see `Ladder`."""
        if self.ladder is None or not self.ladder.copy_due(step, newest):
            return False
        return newest is None or not do_damage(self._diagnosis.open)

    def take(
        self,
        outcome: Outcome,
        norms: Callable[[], Mapping[str, float]] | None = None,
        seen: Seen = _NOTHING,
    ) -> None:
        """Diagnose, respond to and record one step.

        Args:
            outcome: The step.
            norms: Reads the norm of every parameter; asked only when the total is not finite.
            seen: What else has become known with this step.
        """
        finite = math.isfinite(outcome.total_norm)
        theirs = outcome.left_to_scaler and not finite
        dropped = outcome.coefficient == 0.0 or theirs
        # A scaler that looks for its scale meets infinities on purpose: that is no finding.
        self._scaler_skips = self._scaler_skips + 1 if theirs else 0
        findings: list[Finding] = []
        if not theirs or self._scaler_skips > _SCALER_SKIPS:
            findings = self._diagnose(outcome, norms if not finite else None, seen)
        if not theirs or outcome.weights_broken:
            self._respond(outcome, dropped, findings)
        self.recorder.time(seen.time)
        if seen.inspection is not None:
            self.recorder.inspect(seen.inspection)
        self._counts["steps"] += 1
        self._counts["skipped_steps"] += dropped
        self._counts["clipped_steps"] += 0.0 < outcome.coefficient < 1.0
        self._counts["capped_steps"] += outcome.capped > 0
        self.recorder.step(
            StepRecord(
                step=outcome.number,
                loss=outcome.loss,
                total_norm=outcome.total_norm,
                clip_threshold=outcome.plan.clip_limit,
                clip_coef=outcome.coefficient,
                max_ratio=outcome.plan.max_ratio,
                capped_tensors=outcome.capped,
                skipped=dropped,
                lr_scale=outcome.plan.lr_scale,
            )
        )

    def _diagnose(
        self,
        outcome: Outcome,
        norms: Callable[[], Mapping[str, float]] | None,
        seen: Seen,
    ) -> list[Finding]:
        observation = Observation(
            step=outcome.number,
            loss=self._to_fall(outcome.loss),
            total_norm=outcome.total_norm,
            norms=norms() if norms else None,
            time=seen.time,
            inspection=seen.inspection,
            lr=seen.lr,
            new_phase=seen.new_phase,
            origin=seen.origin,
            model=self.model,
        )
        changed = self._diagnosis.observe(observation)
        for finding in by_cause(changed):  # so that who hears of one knows its cause
            self._counts["findings"] += self.recorder.finding(finding)
        # What healed, and what has only been linked to its cause, asks for nothing new.
        found = [f for f in changed if f.until is None and f.step == outcome.number]
        for_all = [finding for finding in found if not finding.local]
        self.wants_exact = bool(for_all) or any(d.wants_exact for d in self._time_detectors)
        return for_all

    def _respond(self, outcome: Outcome, dropped: bool, findings: list[Finding]) -> None:
        if self.ladder is None:
            return
        actions = self.ladder.observe(
            outcome.number,
            total_norm=outcome.total_norm,
            loss=self._to_fall(outcome.loss),
            skipped=dropped,
            large_share=min(outcome.large / max(self.tensors, 1), 1.0),
            findings=findings,
            weights_broken=outcome.weights_broken,
            restorable=self.restorable,
            segment_norms=outcome.segment_norms,
        )
        for action in actions:
            self._counts["rollbacks"] += action.kind is ActionKind.ROLL_BACK
            self.recorder.action(action)

    def _to_fall(self, loss: float | None) -> float | None:
        """What training is to make smaller; not known where groups differ."""
        return None if loss is None or self.loss_sign == 0 else self.loss_sign * loss

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "ladder": self.ladder.state_dict() if self.ladder else None,
            "diagnosis": self._diagnosis.state_dict(),
            "scaler_skips": self._scaler_skips,
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; a part that was not in use then starts afresh."""
        if self.ladder is not None and state["ladder"] is not None:
            self.ladder.load_state_dict(state["ladder"])
        self._diagnosis.load_state_dict(state["diagnosis"])
        self._scaler_skips = state["scaler_skips"]
        self.recorder.adopt(self._diagnosis.open)
        self._counts.update(state["counts"])
