"""Confidence intervals by a bootstrap over families of programs, and within them over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection.judging import JudgedRun

RESAMPLES = 2_000
SEED = 20_250_101
LEVEL = 0.95

Numbers = NDArray[np.float64]


class Bootstrap:
    """How often each run counts in each resample.

    Runs of one family are no independent evidence of each other, and neither are the runs of one
    seed within it: families are drawn with replacement, and for each draw the seeds of the family.

    Args:
        runs: All runs; what is resampled later has one value for each of them, in this order.
        resamples: Number of resamples.
        seed: Of the draws.

    Attributes:
        weights: Shape (resamples + 1, runs); the first row is the sample itself, all ones.
    """

    def __init__(
        self, runs: Sequence[JudgedRun], resamples: int = RESAMPLES, seed: int = SEED
    ) -> None:
        rng = np.random.default_rng(seed)
        families = sorted({run.family for run in runs})
        drawn = (
            rng.multinomial(len(families), np.full(len(families), 1 / len(families)), resamples)
            if families
            else np.zeros((resamples, 0), dtype=np.int64)
        )
        self.weights: Numbers = np.ones((resamples + 1, len(runs)))
        for column, family in enumerate(families):
            seeds = sorted({run.seed for run in runs if run.family == family})
            share = np.full(len(seeds), 1 / len(seeds))
            counts = rng.multinomial(drawn[:, column] * len(seeds), share)
            for number, run in enumerate(runs):
                if run.family == family:
                    self.weights[1:, number] = counts[:, seeds.index(run.seed)]

    def sums(self, values: Any) -> Numbers:
        """Weighted sums of one value per run, or of a matrix with one row per run."""
        sums: Numbers = self.weights @ np.asarray(values, dtype=np.float64)
        return sums

    def medians(self, values: Sequence[float], owners: Sequence[int]) -> Numbers:
        """Weighted medians of values that belong to some of the runs; NaN where none is drawn.

        Args:
            values: The values.
            owners: The number of the run that each belongs to.
        """
        if not values:
            return np.full(len(self.weights), np.nan)
        order = np.argsort(values, kind="stable")
        ranked = np.asarray(values, dtype=np.float64)[order]
        weights = np.cumsum(self.weights[:, np.asarray(owners)[order]], axis=1)
        total = weights[:, -1:]
        # The middle of an even count lies between two values.
        low = np.argmax(weights >= total / 2, axis=1)
        high = np.argmax(weights > total / 2, axis=1)
        medians: Numbers = (ranked[low] + ranked[high]) / 2
        return np.where(total[:, 0] > 0, medians, np.nan)


def ratio(numerator: Numbers, denominator: Numbers) -> Numbers:
    """The quotient; NaN where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Numbers = np.where(denominator > 0, numerator / denominator, np.nan)
    return quotient


def estimate(values: Numbers) -> dict[str, float | None]:
    """The value of the sample and the percentile interval of the resamples.

    Args:
        values: One per row of `Bootstrap.weights`.
    """
    sample, resampled = float(values[0]), values[1:]
    known = resampled[~np.isnan(resampled)]
    if np.isnan(sample):
        return {"value": None, "low": None, "high": None}
    if not len(known):
        return {"value": sample, "low": None, "high": None}
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(known, [tail, 100 - tail])
    return {"value": round(sample, 5), "low": round(float(low), 5), "high": round(float(high), 5)}
