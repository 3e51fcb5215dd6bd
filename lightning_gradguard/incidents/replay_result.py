"""What doing a step again has shown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_gradguard.incidents.reader import Incident
from lightning_gradguard.readings import NonFiniteOrigin
from lightning_gradguard.record.plain_values import plain_values


@dataclass(frozen=True)
class Replay:
    """The step of an incident, done again.

    Attributes:
        incident: The incident.
        origin: Where NaN or Inf first appeared; ``None`` if everything was finite this time, or it
            cannot be told.
        loss: The loss; NaN if it did not get that far.
        total_norm: Norm of all gradients; NaN likewise.
        layers: The layers with the largest gradient norms, largest first, at most three.
        error: What the step raised, with the module in which it did; empty if nothing.
        notes: What limits the result, one sentence each.

    Example:
        >>> origin = NonFiniteOrigin("forward", "rnn", timestep=7, sample=0, tensor="output")
        >>> in_words(origin)[:63]
        'First not finite: in `rnn`, its output, at timestep 7 of sample'
    """

    incident: Incident
    origin: NonFiniteOrigin | None
    loss: float = math.nan
    total_norm: float = math.nan
    layers: tuple[tuple[str, float], ...] = ()
    error: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what is not finite is a string."""
        values: dict[str, Any] = plain_values(
            {
                "directory": str(self.incident.directory),
                "step": self.incident.step,
                "reason": self.incident.reason,
                "origin": self.origin and self.origin.to_dict(),
                "loss": self.loss,
                "total_norm": self.total_norm,
                "layers": [list(layer) for layer in self.layers],
                "error": self.error,
                "notes": list(self.notes),
            }
        )
        return values

    def __str__(self) -> str:
        return "\n".join([str(self.incident), *self._outcome(), *self.notes])

    def _outcome(self) -> list[str]:
        if self.error:
            return [f"The step raises {self.error}"]
        if self.origin is not None:
            return [in_words(self.origin), f"The loss is {self.loss:.6g}."]
        norms = f"The loss is {self.loss:.6g} and the gradient norm {self.total_norm:.6g}"
        if not (math.isfinite(self.loss) and math.isfinite(self.total_norm)):
            return [f"{norms}, but where that begins cannot be told."]
        largest = ", ".join(f"`{name or 'model'}` {norm:.6g}" for name, norm in self.layers)
        return [f"Everything is finite this time. {norms}; the largest: {largest}."]


def in_words(origin: NonFiniteOrigin) -> str:
    """One sentence that names module, tensor, timestep and sample."""
    what = {
        "batch": f"`{origin.module}` of the batch" if origin.module else "the batch",
        "weights": f"the weights, in the parameter `{origin.tensor}`",
        "forward": _of_module(origin, "its output"),
        "loss": "the loss itself",
        "backward": _of_module(origin, f"the {_quoted(origin.tensor or 'gradient')}"),
    }[origin.place]
    after = {
        "batch": "",
        "weights": ", before the step",
        "forward": ", although its input is finite" if origin.module else "",
        "loss": "; the outputs of all modules are finite",
        "backward": ", on the way back from a loss that is finite",
    }[origin.place]
    return f"First not finite: {what}{_at(origin)}{after}."


def _of_module(origin: NonFiniteOrigin, tensor: str) -> str:
    if origin.module:
        return f"in `{origin.module}`, {tensor}"
    if origin.place == "backward":
        return f"between the loss and the model, {tensor}"
    return "in the model's own code outside its parts"


def _quoted(tensor: str) -> str:
    """The name of the parameter, if that is what it says, in quotes."""
    start, _, name = tensor.partition("gradient of ")
    return f"gradient of `{name}`" if not start and name and " " not in name else tensor


def _at(origin: NonFiniteOrigin) -> str:
    if origin.timestep is not None and origin.sample is not None:
        return f", at timestep {origin.timestep} of sample {origin.sample}"
    if origin.timestep is not None:
        return f", at timestep {origin.timestep}"
    return f", in sample {origin.sample}" if origin.sample is not None else ""
