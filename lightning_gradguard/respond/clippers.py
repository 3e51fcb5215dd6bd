"""What carries out a clipping strategy that a single factor on all gradients cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.measure import GradNorms, NormMeter, clean_name
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.respond.clip_thresholds import (
    EVERYTHING,
    ClipBounds,
    ClipSegments,
    make_segments,
)
from lightning_gradguard.respond.clipping import AGC, ClipStrategy, ValueClip
from lightning_gradguard.respond.element_clipper import ElementClipper
from lightning_gradguard.respond.segment_clipper import SegmentClipper
from lightning_gradguard.respond.unit_clipper import UnitClipper
from lightning_gradguard.respond.weight_norms import group_numbers

logger = logging.getLogger("lightning_gradguard")


class GradientClipper(Protocol):
    """Clips the gradients of one step after the other.

    Attributes:
        size: Length of the signal.
        factors: What the gradients were multiplied by in the last step: one number, or (P,).
    """

    size: int
    factors: float | Tensor

    def signal(self, norms: GradNorms, scale: float = 1.0) -> Tensor | None:
        """(K,) device values that are read along with the gradient norm; ``None`` for none.

        Args:
            norms: Of the gradients.
            scale: By which the gradients, but not their norms, are too large: a gradient scaler's,
                where a fused kernel is to divide by it.
        """

    def segment_norms(self, seen: Sequence[float]) -> tuple[float, ...]:
        """From a signal that was read, the norms that thresholds are learned from."""

    def on_host(self, bounds: ClipBounds | None, total_norm: float, seen: Sequence[float]) -> float:
        """Clip what is over; returns the total norm after divided by before, 1.0 for nothing done.

        Args:
            bounds: What the plan allows.
            total_norm: Before clipping.
            seen: The signal of this step, if it has one.
        """

    def on_device(self, bounds: ClipBounds | None, total_norm: Tensor, seen: Tensor) -> Tensor:
        """The same without a host read; returns a ()."""

    def renew(self) -> None:
        """Weights are other ones than before: what is known of them is void."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


def make_clipper(
    settings: ClipStrategy | None, optimizer: Optimizer, meter: NormMeter, *, on_device: bool
) -> tuple[GradientClipper | None, ClipSegments]:
    """The clipper for the parameters of an optimizer, and which of them it clips together.

    Args:
        settings: The strategy.
        optimizer: Its parameter groups are the segments of the scope ``"group"``.
        meter: Measures its parameters.
        on_device: Decide on the device, with no host read.

    Returns:
        No clipper where one factor on all gradients is enough, and then everything is one segment.
    """
    parameters, names = meter.parameters, meter.names
    if settings is None or not parameters:
        return None, EVERYTHING
    if isinstance(settings, ValueClip):
        return ElementClipper(settings, meter, on_device=on_device), EVERYTHING
    agc = settings if isinstance(settings, AGC) else None
    if agc is not None and agc.scope == "unit":
        return UnitClipper(agc, parameters, _left_alone(agc, names, parameters)), EVERYTHING
    if agc is None and settings.scope == "global":
        return None, EVERYTHING
    if agc is not None and len({parameter.device for parameter in parameters}) > 1:
        logger.warning(
            "GradGuard leaves out AGC(scope=%r): parameters are on several devices.", agc.scope
        )
        return None, EVERYTHING
    group_of = group_numbers(optimizer, parameters)
    exclude = agc.exclude if agc is not None else ()
    segments = make_segments(settings.scope, names, group_of, exclude)
    return SegmentClipper(parameters, segments, agc), segments


def warn_of_unknown_names(settings: ClipStrategy | None, names: Iterable[str]) -> None:
    """Say which patterns of ``exclude`` match no parameter of the model: a typing error, mostly."""
    patterns = settings.exclude if isinstance(settings, AGC) else ()
    known = [clean_name(name) for name in names] if patterns else []
    unknown = [p for p in patterns if not any(fnmatchcase(name, p) for name in known)]
    if unknown:
        logger.warning("AGC is told to exclude %s, but no parameter has such a name.", unknown)


def _left_alone(agc: AGC, names: Sequence[str], parameters: Sequence[Tensor]) -> set[int]:
    """Numbers of the parameters that are excluded, or of which this process has a part only."""
    sharded = {i for i, p in enumerate(parameters) if local_tensor(p) is not p}
    if sharded:
        logger.warning(
            "AGC leaves %d sharded tensors alone, as their rows may be on several processes; "
            "AGC(scope='layer') clips them.",
            len(sharded),
        )
    return sharded | {
        i for i, name in enumerate(names) if any(fnmatchcase(name, p) for p in agc.exclude)
    }
