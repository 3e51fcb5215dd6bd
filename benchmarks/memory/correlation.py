"""Spearman's rank correlation, with an interval from a bootstrap over groups.

Shape suffixes: ``N`` pairs, ``G`` groups, ``U`` different values, ``R`` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

RESAMPLES = 2_000
_SEED = 20_250_101
_TAILS = (0.025, 0.975)


def ranks(values_N: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    return _ranks(values_N, torch.ones(1, len(values_N), dtype=torch.float64))[0]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Between -1 and 1; NaN where all values of one side are equal.

    Example:
        >>> round(spearman([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 9.0]), 3)
        0.8
    """
    return float(_correlations(first, second, torch.ones(1, len(first), dtype=torch.float64)))


def interval(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable]
) -> tuple[float, float]:
    """95% percentile interval of :func:`spearman`; NaN with fewer than three groups.

    Pairs of one group, as the seeds of one model at one task, are no independent evidence of each
    other: groups are drawn with replacement, each with all its pairs.

    Args:
        first: One value per pair.
        second: One value per pair.
        groups: The group of each pair.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < 3:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(_SEED)
    drawn_RG = torch.randint(len(names), (RESAMPLES, len(names)), generator=generator)
    times_RG = torch.zeros(RESAMPLES, len(names), dtype=torch.float64)
    times_RG.scatter_add_(1, drawn_RG, torch.ones_like(times_RG))
    times_RN = times_RG[:, torch.tensor([names.index(group) for group in groups])]
    rho_R = _correlations(first, second, times_RN)
    known = rho_R[~rho_R.isnan()]
    if not len(known):
        return math.nan, math.nan
    low, high = known.quantile(torch.tensor(_TAILS, dtype=torch.float64)).tolist()
    return low, high


def _correlations(first: Sequence[float], second: Sequence[float], times_RN: Tensor) -> Tensor:
    """Of each resample, in which each pair comes so many times."""
    centered = []
    total_R1 = times_RN.sum(1, keepdim=True)
    for side in (first, second):
        ranks_RN = _ranks(torch.tensor(side, dtype=torch.float64), times_RN)
        centered.append(ranks_RN - (times_RN * ranks_RN).sum(1, keepdim=True) / total_R1)
    x_RN, y_RN = centered
    squares = [(times_RN * side.square()).sum(1) for side in centered]
    # Of equal values not even the rounding of their mean is to be divided by.
    constant_R = torch.minimum(*squares) < 1e-9
    rho_R = (times_RN * x_RN * y_RN).sum(1) / (squares[0] * squares[1]).sqrt()
    return torch.where(constant_R, math.nan, rho_R)


def _ranks(values_N: Tensor, times_RN: Tensor) -> Tensor:
    """(R, N) ranks in each resample; of pairs that do not come, any."""
    found_U, places_N = values_N.unique(return_inverse=True)
    counts_RU = times_RN.new_zeros(len(times_RN), len(found_U)).index_add_(1, places_N, times_RN)
    means_RU: Tensor = counts_RU.cumsum(1) - (counts_RU - 1.0) / 2.0
    return means_RU[:, places_N]
