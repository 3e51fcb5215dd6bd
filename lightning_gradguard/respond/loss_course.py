"""What the course of a loss says about the updates that are made.

Scaling the loss changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

# Standard error of a median of n normal values, in units of their scale / sqrt(n).
_MEDIAN_ERROR = 1.2533
_MAD_TO_SCALE = 1.4826
# Shares of the first loss by which later ones have to exceed it: the median of five, or two in a
# row, one of them finite. A single bad batch says nothing, nor do two that hold NaN, and some
# healthy runs leap once and are far below at once.
_OVERSHOOT, _LEAP = 0.07, 3.0
# Losses whose median is compared, and how many standard errors it has to rise by. The lowest of up
# to nine medians is 1.5 of them low by chance.
_BLOCK = 5
_RISE = 3.5
# The latest losses, whose noise counts if it is the larger one.
_LATE = 15


def improved(before: Sequence[float], now: Sequence[float], confidence: float) -> bool:
    """Whether the median fell by more than ``confidence`` standard errors of the difference.

    Example:
        >>> improved([5.0, 5.1, 4.9, 5.0], [4.0, 4.1, 3.9, 4.0], confidence=2.0)
        True
    """
    center_before, center_now = median(before), median(now)
    if not math.isfinite(center_now):
        return False
    if not math.isfinite(center_before):
        return True
    deviations = [abs(loss - center_before) for loss in before]
    deviations += [abs(loss - center_now) for loss in now]
    scale = _MAD_TO_SCALE * median(deviations)
    error = _MEDIAN_ERROR * scale * math.sqrt(1.0 / len(before) + 1.0 / len(now))
    return center_before - center_now > confidence * error


def overshoots(losses: Sequence[float]) -> bool:
    """Whether the last losses are above the first one, which is that of untrained weights.

    The size of the first loss is all there is to compare with: a run that explodes leaves no
    time to learn how noisy it is. Losses that go below zero have no such size: two in a row have to
    leap out of all that there were, five at least.

    Example:
        >>> overshoots([2.3, 2.5, 2.6, 2.2]), overshoots([2.3, 2.5, 2.6, 2.2, 2.7, 2.6])
        (False, True)
    """
    first, later = losses[0], losses[1:]
    if min(losses) < 0.0:
        known = losses[:-2]
        if len(known) < _BLOCK:
            return False
        return min(losses[-2:]) - max(known) > _LEAP * (max(known) - min(known))
    if len(later) > 1 and _LEAP * first < min(later[-2:]) - first < math.inf:
        return True
    return len(later) >= _BLOCK and median(later[-_BLOCK:]) - first > _OVERSHOOT * first


def rises(losses: Sequence[float]) -> bool:
    """Whether the latest losses are beyond the noise above the lowest that were reached.

    Asked for every loss, it answers for each fifth one: blocks of five are compared.

    Example:
        >>> rises([2.3, 2.4] * 5), rises([2.3, 2.4, 2.3, 2.4, 2.3, 3.3, 3.4, 3.3, 3.4, 3.3])
        (False, True)
    """
    if len(losses) < 2 * _BLOCK or len(losses) % _BLOCK:
        return False
    *earlier, latest = (median(losses[i : i + _BLOCK]) for i in range(0, len(losses), _BLOCK))
    # Of successive losses, in which a trend cancels. It often grows as the loss falls.
    differences = [abs(later - sooner) for sooner, later in pairwise(losses)]
    noise = max(median(differences), median(differences[-_LATE:]))
    scale = _MAD_TO_SCALE * noise / math.sqrt(2.0)
    error = _MEDIAN_ERROR * scale * math.sqrt(2.0 / _BLOCK)
    if not math.isfinite(latest):
        return math.isfinite(min(earlier))
    return latest - min(earlier) > _RISE * error
