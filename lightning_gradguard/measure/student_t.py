"""Quantiles for 95% confidence intervals, without SciPy."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # quantile .975 of the normal distribution


def student_t(degrees: int) -> float:
    """Quantile .975 of Student's t, exact to 0.2%.

    Args:
        degrees: Degrees of freedom, at least 1.

    Example:
        >>> [round(student_t(degrees), 2) for degrees in (1, 2, 3, 10, 1000)]
        [12.71, 4.3, 3.18, 2.23, 1.96]
    """
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    # Cornish-Fisher expansion in 1 / degrees (Abramowitz and Stegun 26.7.5).
    terms = (
        _Z,
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
        (79 * _Z**9 + 776 * _Z**7 + 1482 * _Z**5 - 1920 * _Z**3 - 945 * _Z) / 92160,
    )
    return float(sum(term / degrees**power for power, term in enumerate(terms)))
