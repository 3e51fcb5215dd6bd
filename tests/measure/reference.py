"""Gradient norms by their definition: float64, plain Python, one element after the other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor


def elements(grad: Tensor) -> list[complex]:
    """Every element of a gradient of any layout; entries at one index are added up."""
    if grad.is_sparse:
        cells: dict[tuple[object, ...], complex] = defaultdict(complex)
        indices = grad._indices().T.tolist()
        for index, row in zip(indices, grad._values(), strict=True):
            for inner, value in enumerate(row.reshape(-1).tolist()):
                cells[(*index, inner)] += value
        return list(cells.values())
    return grad.detach().to_dense().reshape(-1).tolist()


def norm(values: Iterable[complex]) -> float:
    magnitudes = [abs(value) for value in values]
    largest = max(magnitudes, default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return math.nan if any(map(math.isnan, magnitudes)) else largest
    # Scaled by a power of two, which is exact, so that no square leaves the range of a double.
    unit = 2.0 ** math.frexp(largest)[1]
    return unit * math.sqrt(math.fsum((m / unit) ** 2 for m in magnitudes))


def parameter_norms(named: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
    return {name: norm(elements(p.grad)) for name, p in named if p.grad is not None}


def total_norm(named: Sequence[tuple[str, Tensor]]) -> float:
    return norm([v for _, p in named if p.grad is not None for v in elements(p.grad)])


def layer_norms(norms: Mapping[str, float], depth: int | None) -> dict[str, float]:
    members: dict[str, list[float]] = {}
    for name, value in norms.items():
        module = name.rpartition(".")[0] or name
        while depth is not None and module.count(".") >= depth:
            module = module.rpartition(".")[0]
        members.setdefault(module, []).append(value)
    return {layer: norm(values) for layer, values in members.items()}
