"""The detector of NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_gradguard.diagnose.detector import Observation
from lightning_gradguard.diagnose.episode import Episode
from lightning_gradguard.diagnose.findings import Finding, Pathology, Remedy, Severity
from lightning_gradguard.diagnose.places import in_words, module_of
from lightning_gradguard.diagnose.thresholds import Thresholds

_NON_FINITE_GRADIENT = (
    Remedy(
        "Drop such steps before they reach the weights.",
        "Trainer(callbacks=[GradGuard()])",
    ),
    Remedy(
        "Lower the learning rate, because weights that grew too far overflow first.",
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * lr)",
    ),
    Remedy(
        "Use bfloat16, whose range is that of float32, if the run is in float16.",
        'Trainer(precision="bf16-mixed")',
    ),
)
_NON_FINITE_LOSS = (
    Remedy(
        "Check the batch, because an infinite input or label reaches the loss first.",
        "assert all(torch.isfinite(t).all() for t in batch)",
    ),
    Remedy(
        "Keep logarithms and divisions in the loss away from zero.",
        "loss = -torch.log(probability.clamp_min(1e-8)).mean()",
    ),
    Remedy(
        "Drop such steps before they reach the weights.",
        "Trainer(callbacks=[GradGuard()])",
    ),
)


class NonFiniteDetector:
    """NaN or Inf in the loss or a gradient: critical at once, without a gate.

    Names the module of the first parameter, in forward order, whose norm is not finite; `"model"`
    if no parameter's norm shows it; `"loss"` if the gradients are finite.
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
        if math.isfinite(observation.total_norm):
            return [_non_finite_loss(observation)]
        return [_non_finite_gradient(observation, loss_is_finite)]

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


def _non_finite_loss(observation: Observation) -> Finding:
    return Finding(
        Pathology.NON_FINITE,
        Severity.CRITICAL,
        "loss",
        observation.step,
        {"loss_is_finite": 0.0, "non_finite_parameters": 0.0},
        f"The loss is {observation.loss} at step {observation.step} although all gradients are "
        "finite, so the batch or the loss function is at fault and the step teaches nothing.",
        _NON_FINITE_LOSS,
    )


def _non_finite_gradient(observation: Observation, loss_is_finite: bool) -> Finding:
    norms = observation.norms or {}
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    where = module_of(bad[0]) if bad else "model"
    count = f" ({len(bad)} of {len(norms)} parameters)" if bad else ""
    loss = "finite" if loss_is_finite else str(observation.loss)
    return Finding(
        Pathology.NON_FINITE,
        Severity.CRITICAL,
        where,
        observation.step,
        {
            "loss_is_finite": float(loss_is_finite),
            "non_finite_parameters": float(len(bad)),
            "parameters": float(len(norms)),
        },
        f"The gradient in {in_words(where)} is not finite at step {observation.step}{count} while "
        f"the loss is {loss}, so this step would make the weights NaN for good.",
        _NON_FINITE_GRADIENT if loss_is_finite else _NON_FINITE_LOSS,
    )
