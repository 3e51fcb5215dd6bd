"""From norms and thresholds to the factors that gradients are multiplied by.

Shape legend: ``S`` segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.respond.clip_levels import clip_target

# Of a step of which something was clipped: in float32 too it is not 1.
_JUST_BELOW_ONE = 1.0 - 2.0**-24


def clip_coefficient(total_norm: float, threshold: float, center: float = -math.inf) -> float:
    """The factor that brings ``total_norm`` down to its target; 1.0 where nothing is to do.

    An infinite norm is left alone: multiplied by 0 its infinities become NaN, and all else is lost.

    Args:
        total_norm: The norm.
        threshold: Beyond which it is clipped.
        center: See :func:`~lightning_gradguard.respond.clip_levels.clip_target`.

    Example:
        >>> clip_coefficient(4.0, 1.0), clip_coefficient(0.5, 1.0)
        (0.25, 1.0)
    """
    if threshold < total_norm < math.inf:
        return clip_target(total_norm, threshold, center) / total_norm
    return 1.0


def device_coefficients(
    norms_S: Tensor, thresholds_S: Tensor | float, centers_S: Tensor | float = -math.inf
) -> Tensor:
    """The same for many norms, on their device.

    Args:
        norms_S: The norms.
        thresholds_S: Beyond which each is clipped.
        centers_S: See :func:`~lightning_gradguard.respond.clip_levels.clip_target`; ``-inf`` for
            none at all, or one of each.

    Example:
        >>> device_coefficients(torch.tensor([4.0, 0.5, math.inf]), 1.0)
        tensor([0.2500, 1.0000, 1.0000])
    """
    targets_S: Tensor | float = thresholds_S
    if isinstance(centers_S, Tensor) or centers_S > -math.inf:
        room_S = thresholds_S - centers_S
        targets_S = centers_S + room_S * (room_S / (norms_S - centers_S))
    if isinstance(centers_S, Tensor):
        targets_S = torch.where(centers_S > -math.inf, targets_S, thresholds_S)
    over_S = (norms_S > thresholds_S) & norms_S.isfinite()
    return torch.where(over_S, targets_S / norms_S, 1.0)


def overall(after: float, before: float) -> float:
    """The total norm after clipping divided by that before, for a step on which some was clipped.

    Below 1, however little was; 1.0 for a norm that is not finite, whose share cannot be told.

    Example:
        >>> overall(3.0, 4.0), overall(4.0, 4.0) < 1.0, overall(math.inf, math.inf)
        (0.75, True, 1.0)
    """
    if not 0.0 < before < math.inf:
        return 1.0
    return min(after / before, _JUST_BELOW_ONE)


def device_overall(after: Tensor, before: Tensor, clipped: Tensor) -> Tensor:
    """The same on the device, and 1 where nothing was clipped.

    Args:
        after: () norm after clipping.
        before: () norm before.
        clipped: () whether anything was.
    """
    known = clipped & before.isfinite() & (before > 0.0)
    return torch.where(known, (after / before).clamp(max=_JUST_BELOW_ONE), 1.0)


def widest(device: torch.device) -> torch.dtype:
    """In which squares are summed: those of float32 norms leave the range of float32."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def scale_gradients(gradients: Sequence[Tensor], coefficient: float) -> None:
    """Multiply every gradient in place; one multi-tensor call per device and dtype."""
    torch._foreach_mul_(list(gradients), coefficient)
