"""The detector of NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Finding, Pathology, Severity
from lightning_gradguard.diagnose.places import in_words, module_of
from lightning_gradguard.diagnose.thresholds import Thresholds
from lightning_gradguard.readings import NonFiniteOrigin


class NonFiniteDetector:
    """NaN or Inf in the loss or a gradient: critical at once, without a gate.

    Names the place that was found by looking again (`Observation.origin`): a module, `"batch"` or
    `"loss"`. Without it, the norms tell: under a finite loss the trouble began on the way back, in
    the last module, in forward order, whose gradient is not finite, as it passes on to all before
    it. Under a loss that is not, every gradient may be so: `"model"`, or `"loss"` if all gradients
    are finite.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._episode = Episode((thresholds or Thresholds()).heal_steps)

    def observe(self, observation: Observation) -> list[Finding]:
        """Takes in one step; see `Detector.observe`."""
        loss = observation.loss
        loss_is_finite = loss is None or math.isfinite(loss)
        if loss_is_finite and math.isfinite(observation.total_norm):
            self._episode.calm()
            return []
        if not self._episode.report(Severity.CRITICAL):
            return []
        return [_finding(observation)]

    def is_open(self, where: str) -> bool:
        """Whether the finding has not healed; see `Detector.is_open`."""
        return self._episode.open

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; see `Detector.state_dict`."""
        return {"episode": self._episode.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `Detector.load_state_dict`."""
        self._episode.load_state_dict(state["episode"])

    def reset(self) -> None:
        """Forgets everything."""
        self._episode.reset()


def _finding(observation: Observation) -> Finding:
    origin = observation.origin
    loss_is_finite = observation.loss is None or math.isfinite(observation.loss)
    evidence = _evidence(observation, loss_is_finite)
    if origin is not None:
        where, message = _of_origin(observation, origin)
        evidence |= _position(origin)
    elif math.isfinite(observation.total_norm):
        where, message = _of_loss(observation)
    else:
        where, message = _of_norms(observation)
    return Finding(
        Pathology.NON_FINITE,
        Severity.CRITICAL,
        where,
        observation.step,
        evidence,
        message,
        timestep=origin.timestep if origin is not None else None,
        since=observation.step,
        fact=True,
    )


def _evidence(observation: Observation, loss_is_finite: bool) -> dict[str, float]:
    norms = observation.norms or {}
    return {
        "loss_is_finite": float(loss_is_finite),
        "non_finite_parameters": float(len(_bad(norms))),
        "parameters": float(len(norms)),
    }


def _position(origin: NonFiniteOrigin) -> dict[str, float]:
    numbers = {"timestep": origin.timestep, "sample": origin.sample}
    known = {name: float(number) for name, number in numbers.items() if number is not None}
    return {**known, "batch": 1.0} if origin.place == "batch" else known


def _bad(norms: Mapping[str, float]) -> list[str]:
    return [name for name, norm in norms.items() if not math.isfinite(norm)]


# ---- found by looking again ---------------------------------------------------------------------


def _of_origin(observation: Observation, origin: NonFiniteOrigin) -> tuple[str, str]:
    """The place and the sentence about it."""
    step, at = observation.step, _at(origin)
    where = origin.module or "model"
    place = in_words(where) if origin.module else "the model's own code outside its modules"
    if origin.place == "batch":
        part = f" in `{origin.module}`" if origin.module else ""
        return "batch", (
            f"The batch of step {step} holds NaN or Inf{part}{at}, so no loss or gradient of it "
            "can be used."
        )
    if origin.place == "weights":
        return where, (
            f"The weights of {in_words(where)} hold NaN or Inf before step {step}, so every loss "
            "and gradient from then on is lost."
        )
    if origin.place == "loss":
        return "loss", (
            f"The loss is {_loss(observation)} at step {step} although the outputs of all modules "
            "are finite, so the loss function itself is at fault."
        )
    if origin.place == "forward":
        finite_input = ", although its input is" if origin.module else ""
        return where, (
            f"The forward pass is first not finite in {place} at step {step}{at}{finite_input}, so "
            f"the loss is {_loss(observation)}."
        )
    if not origin.module:
        place = "the loss, before it reaches the model,"
    return where, (
        f"The backward pass is first not finite in {place} at step {step}{at} while the loss is "
        f"{_loss(observation)}, so this step would make the weights NaN for good."
    )


def _at(origin: NonFiniteOrigin) -> str:
    if origin.timestep is not None and origin.sample is not None:
        return f", at timestep {origin.timestep} of sample {origin.sample}"
    if origin.timestep is not None:
        return f", at timestep {origin.timestep}"
    return f", in sample {origin.sample}" if origin.sample is not None else ""


def _loss(observation: Observation) -> str:
    loss = observation.loss
    if loss is None:
        return "not known"
    return "NaN" if math.isnan(loss) else f"{loss:.3g}".replace("inf", "Inf")


# ---- told from the norms ------------------------------------------------------------------------


def _of_loss(observation: Observation) -> tuple[str, str]:
    return "loss", (
        f"The loss is {_loss(observation)} at step {observation.step} although all gradients are "
        "finite, so the batch or the loss function is at fault and the step teaches nothing."
    )


def _of_norms(observation: Observation) -> tuple[str, str]:
    where = _last_in_forward_order(observation)
    norms = observation.norms or {}
    bad = len(_bad(norms))
    count = f" ({bad} of {len(norms)} parameters)" if bad else ""
    back = "of the model" if where == "model" else f"from {in_words(where)} back to the input"
    return where, (
        f"The gradient {back} is not finite at step {observation.step}{count} while the loss is "
        f"{_loss(observation)}, so this step would make the weights NaN for good."
    )


def _last_in_forward_order(observation: Observation) -> str:
    """Where the gradient, which comes from the loss, was not finite for the first time."""
    norms, loss = observation.norms or {}, observation.loss
    bad = _bad(norms)
    if not bad or (loss is not None and not math.isfinite(loss)):
        return "model"
    if loss is None and bad[-1] == list(norms)[-1]:
        return "model"  # as it comes from the loss, which may be to blame
    return module_of(bad[-1])
