"""Fewer rows of the past: spread evenly over its steps, and its peaks among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Of the room there is, what rows that should stay may take.
_SHARE_OF_KEPT = 0.5


@dataclass(frozen=True)
class Facts:
    """What thinning has to know of N rows, which are in the order of their steps.

    Attributes:
        steps: Shape ``(N,)``, ascending.
        weights: Of rows that are close to each other the heaviest stays; of equal ones the first.
        groups: Number of the series a row belongs to; it stands for rows of that one only.
        kept: Whether it should stay in any case.
    """

    steps: Integers
    weights: Numbers
    groups: Integers
    kept: Bools

    @classmethod
    def of_steps(cls, steps: Integers) -> Facts:
        """Rows of one series of which none weighs more than another."""
        count = len(steps)
        return cls(steps, np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.bool_))


def thinned(facts: Facts, sizes: Integers, max_bytes: int) -> Bools:
    """Which rows stay, so that they take at most ``max_bytes``.

    Their steps are cut into stretches of equal length, as many as there is room for, and of each
    stretch the heaviest row stays. So the past as a whole keeps one resolution, however often it is
    thinned; to halve its older part each time would leave nothing of the beginning of a long run.
    Rows that should stay in any case do so while they take at most half of the room.

    Args:
        facts: Of the rows.
        sizes: Their bytes, shape ``(N,)``.
        max_bytes: The room there is.

    Returns:
        Shape ``(N,)``.

    Example:
        >>> ten = Facts.of_steps(np.arange(10))
        >>> np.flatnonzero(thinned(ten, np.full(10, 8), max_bytes=40)).tolist()
        [0, 2, 4, 6, 8]
    """
    stays = facts.kept.copy()
    if sizes[stays].sum() > _SHARE_OF_KEPT * max_bytes:
        stays[:] = False
    rest = np.flatnonzero(~stays)
    room = max_bytes - int(sizes[stays].sum())
    if sizes[rest].sum() <= room:
        return np.ones_like(stays)
    series = len(np.unique(facts.groups[rest]))
    stretches = max(1, int(room / (sizes[rest].mean() * series)))
    while stretches > 0:
        heaviest = rest[_heaviest(facts, rest, stretches)]
        if sizes[heaviest].sum() <= room:
            stays[heaviest] = True
            break
        stretches = stretches * 3 // 4
    return stays


def _heaviest(facts: Facts, rows: Integers, stretches: int) -> Integers:
    """Of each series and stretch the heaviest row, as places in ``rows``."""
    steps = facts.steps[rows] - facts.steps[rows[0]]
    stretch = steps * stretches // (steps[-1] + 1)
    place = facts.groups[rows] * stretches + stretch
    order = np.lexsort((-facts.weights[rows], place))  # stable: of equal ones the first is first
    first: Integers = np.unique(place[order], return_index=True)[1]
    return order[first]


def not_done_again(steps: Integers, *, shared: bool = False) -> Bools:
    """Which rows no later row has replaced, where a run went back to a checkpoint.

    Args:
        steps: In the order in which the rows were written, shape ``(N,)``.
        shared: Whether several rows may be of one step.

    Example:
        >>> not_done_again(np.array([0, 1, 2, 1, 2, 3])).tolist()
        [True, False, False, True, True, True]
    """
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.iinfo(np.int64).max)
    return steps <= later if shared else steps < later
