"""One step of an optimizer on its way through the guard."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_gradguard.pipeline import Outcome
from lightning_gradguard.readings import NonFiniteOrigin, Seen
from lightning_gradguard.respond.clippers import GradientClipper
from lightning_gradguard.respond.update_bounds import UpdateBound


@dataclass
class Step:
    """A step under way.

    Attributes:
        outcome: What becomes of it, as far as the host knows.
        norms: Reads the gradient norm of every parameter.
        bound: The bound whose signal is read with it; ``None`` without a cap.
        seen: What has become known with it about itself and earlier ones.
        on_device: Where it was decided on the device: the coefficient; and gradient norm, loss,
            whether weights are broken, count of failed ranks, the clipper's signal and the bound's.
        clipper: What clips its segments; ``None`` if nothing does, or something else than now.
        clip_size: Length of the clipper's signal.
    """

    outcome: Outcome
    norms: Callable[[], Mapping[str, float]]
    bound: UpdateBound | None
    seen: Seen
    on_device: tuple[Tensor, Tensor] | None = None
    clipper: GradientClipper | None = None
    clip_size: int = 0

    @property
    def dropped(self) -> bool:
        """Whether it is known to be left out."""
        return self.outcome.coefficient == 0.0

    def segment_norms(self, clips: list[float]) -> tuple[float, ...]:
        """From the clipper's signal, the norms that thresholds are learned from."""
        return () if self.clipper is None else self.clipper.segment_norms(clips)

    def left_out(self) -> bool | Tensor:
        """The same, on the device where that was decided there."""
        return self.dropped if self.on_device is None else self.on_device[0].view(()) == 0.0

    @property
    def lacks_origin(self) -> bool:
        """Whether the host knows that it is not finite, and no scaler is to mend that."""
        if self.on_device is not None or self.outcome.left_to_scaler:
            return False
        loss = self.outcome.loss
        finite = math.isfinite(self.outcome.total_norm) and (loss is None or math.isfinite(loss))
        return not finite and self.seen.origin is None

    def explain(self, origin: NonFiniteOrigin) -> None:
        """Take in where it was first not finite."""
        self.seen = self.seen.with_origin(origin)

    def to_dict(self, values: list[float]) -> dict[str, Any]:
        """As plain values, with what was read of it."""
        # Where a norm that is not finite comes from will be asked.
        norms = {} if all(map(math.isfinite, values)) else dict(self.norms())
        return {
            "outcome": self.outcome.to_dict(),
            "values": values,
            "norms": norms,
            "seen": self.seen.to_dict(),
            "clip_size": self.clip_size,
        }

    @classmethod
    def from_dict(
        cls,
        state: Mapping[str, Any],
        bound: UpdateBound | None,
        clipper: GradientClipper | None = None,
    ) -> tuple[Step, list[float]]:
        """The inverse of :meth:`to_dict`: a step that is over, and what was read of it."""
        outcome, seen = Outcome.from_dict(state["outcome"]), Seen.from_dict(state["seen"])
        step = cls(outcome, partial(dict, state["norms"]), bound, seen)
        step.clipper, step.clip_size = clipper, int(state.get("clip_size", 0))
        return step, list(state["values"])
