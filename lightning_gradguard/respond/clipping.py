"""Bound the gradient norm of a step by the run's own history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradguard._validation import check_number


@dataclass(frozen=True)
class AdaptiveClip:
    """Clip the total gradient norm to a multiple of the run's own median norm.

    There is no absolute threshold, so scaling the loss changes nothing.

    Args:
        multiple: The threshold as a multiple of the running median norm. Default 10: it is there
            for outliers, which would fill Adam's second moment for a thousand steps; clipping
            ordinary noise costs slow starters, and large updates are the cap's business.

    Raises:
        TypeError: If ``multiple`` is not a number.
        ValueError: If ``multiple`` is not positive.

    Example:
        >>> AdaptiveClip().threshold(median_norm=0.5)
        5.0
    """

    multiple: float = 10.0

    def __post_init__(self) -> None:
        check_number("multiple", self.multiple, above=0.0)

    def threshold(self, median_norm: float | None) -> float:
        """The norm to clip to; ``inf`` while there is no baseline yet."""
        return math.inf if median_norm is None else self.multiple * median_norm


def clip_coefficient(total_norm: float, threshold: float) -> float:
    """The factor that brings ``total_norm`` down to ``threshold``; 1.0 where nothing is to do.

    An infinite norm is left alone: multiplied by 0 its infinities become NaN, and all else is lost.

    Example:
        >>> clip_coefficient(4.0, 1.0), clip_coefficient(0.5, 1.0)
        (0.25, 1.0)
    """
    return threshold / total_norm if threshold < total_norm < math.inf else 1.0


@torch.no_grad()
def scale_gradients(gradients: Sequence[Tensor], coefficient: float) -> None:
    """Multiply every gradient in place; one multi-tensor call per device and dtype."""
    torch._foreach_mul_(list(gradients), coefficient)
