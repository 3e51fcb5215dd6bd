"""Gradient norms aggregated over an epoch and over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class LogNormStatistics(Metric):
    """Mean, standard deviation and maximum of log gradient norms.

    Norms are positive and span decades, so their logarithm is what can be averaged. The states
    are sums, so memory does not grow with the number of steps and ranks combine in one reduction.
    Norms that are zero or not finite have no logarithm: they are counted, not averaged.

    Args:
        sync_on_compute: Whether :meth:`compute` combines the ranks.

    Example:
        >>> import torch
        >>> statistics = LogNormStatistics()
        >>> statistics.update(torch.tensor([1.0, torch.e**2, float("nan")]))
        >>> {name: round(value.item(), 4) for name, value in statistics.compute().items()}
        {'mean': 1.0, 'std': 1.0, 'max': 2.0, 'count': 2.0, 'left_out': 1.0}
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    sum: Tensor
    sum_of_squares: Tensor
    max: Tensor
    count: Tensor
    left_out: Tensor

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        zero = torch.tensor(0.0, dtype=torch.float64)
        for name in ("sum", "sum_of_squares", "count", "left_out"):
            self.add_state(name, default=zero.clone(), dist_reduce_fx="sum")
        self.add_state("max", default=torch.tensor(-torch.inf), dist_reduce_fx="max")

    def update(self, norms: Tensor | float) -> None:
        """Add one norm or a batch of them, of any shape."""
        values = torch.as_tensor(norms, device=self.device).detach().flatten().double()
        usable = torch.isfinite(values) & (values > 0)
        logs = torch.where(usable, values, 1.0).log()
        self.sum += logs.sum()
        self.sum_of_squares += logs.square().sum()
        self.count += usable.sum()
        self.left_out += (~usable).sum()
        if values.numel():
            top = torch.where(usable, logs, -torch.inf).amax()
            self.max = torch.maximum(self.max, top.to(self.max.dtype))

    def compute(self) -> dict[str, Tensor]:
        """``mean``, ``std`` (population) and ``max`` of the log-norms, ``count``, ``left_out``.

        Without any usable norm, ``mean`` and ``std`` are NaN and ``max`` is ``-inf``.
        """
        mean = self.sum / self.count
        variance = (self.sum_of_squares / self.count - mean.square()).clamp(min=0.0)
        return {
            "mean": mean,
            "std": variance.sqrt(),
            "max": self.max,
            "count": self.count,
            "left_out": self.left_out,
        }
