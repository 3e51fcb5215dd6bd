"""The numbers of each layer, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.record.run_history import Floats, LayerMatrix, OptimizerHistory

MAX_ROWS = 1_000
# The change over the run is that from its first to its last tenth.
_TENTH = 10


@dataclass(frozen=True)
class LayerRow:
    """One layer; NaN where a number is not known.

    Attributes:
        name: Of the layer.
        median: Of its gradient norm over the run.
        largest: Of its gradient norm.
        last: Its gradient norm at the last step that was kept.
        update: Its last relative update.
        change: Median norm in the last tenth of the run, relative to that in the first.
        findings: How many findings are in it.
    """

    name: str
    median: float
    largest: float
    last: float
    update: float
    change: float
    findings: int


def layer_rows(part: OptimizerHistory) -> list[LayerRow]:
    """One row for each layer, in the order of the model; at most :data:`MAX_ROWS`.

    Of more layers, those with findings are kept, and those whose norm differs most from the others.
    """
    matrix = part.layers
    if not matrix.values.size:
        return []
    middle = column_medians(matrix.values)
    found = _findings_by_layer(matrix.names, part.findings)
    kept = _kept(middle, found)
    largest = np.fmax.reduce(matrix.values, axis=0)
    tenth = -(-len(matrix.steps) // _TENTH)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = column_medians(matrix.values[-tenth:]) / column_medians(matrix.values[:tenth])
    updates = _last_by_name(part.updates)
    return [
        LayerRow(
            name=matrix.names[at],
            median=float(middle[at]),
            largest=float(largest[at]),
            last=float(matrix.values[-1, at]),
            update=updates.get(matrix.names[at], math.nan),
            change=float(change[at]),
            findings=found[at],
        )
        for at in kept
    ]


def column_medians(values: Floats) -> Floats:
    """The median of each column's values, without NaN; NaN where there is none."""
    known = ~np.isnan(values)
    if known.all():
        return np.median(values, axis=0)
    medians = np.full(values.shape[1], np.nan)
    some = known.any(axis=0)
    medians[some] = np.nanmedian(values[:, some], axis=0)
    return medians


def _findings_by_layer(names: Sequence[str], findings: Sequence[Finding]) -> list[int]:
    """How many findings are in each layer or in a part of it."""
    places = [finding.where for finding in findings]
    if not places:
        return [0] * len(names)
    return [
        sum(place == name or place.startswith(f"{name}.") for place in places) for name in names
    ]


def _kept(middle: Floats, found: Sequence[int]) -> list[int]:
    if len(middle) <= MAX_ROWS:
        return list(range(len(middle)))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(middle)
    finite = logs[np.isfinite(logs)]
    usual = float(np.median(finite)) if finite.size else 0.0
    distance = np.where(np.isfinite(logs), np.abs(logs - usual), np.inf)
    ranked = sorted(range(len(middle)), key=lambda at: (-found[at], -distance[at], at))
    return sorted(ranked[:MAX_ROWS])


def _last_by_name(matrix: LayerMatrix) -> dict[str, float]:
    if not matrix.values.size:
        return {}
    return dict(zip(matrix.names, matrix.values[-1].tolist(), strict=True))
