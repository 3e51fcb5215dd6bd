"""Gradient norms over an epoch."""

from __future__ import annotations

import torch

from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record.metrics import metric_key
from lightning_gradguard.record.statistics import LogNormStatistics

# A metric's update costs about 100 µs, whatever the size of the batch: collect before updating.
_BATCH = 1024


class EpochNorms:
    """Collects the norm of every step and aggregates them at the end of an epoch."""

    def __init__(self) -> None:
        self._pending: dict[str, list[float]] = {}
        self._last_step: dict[str, int] = {}
        self._metrics: dict[str, LogNormStatistics] = {}

    def add(self, engine: GuardEngine) -> None:
        """Take in the last step of ``engine``, once."""
        row, label = engine.recorder.last, engine.recorder.label
        if row is None or self._last_step.get(label) == row.step:
            return
        self._last_step[label] = row.step
        pending = self._pending.setdefault(label, [])
        pending.append(row.total_norm)
        if len(pending) >= _BATCH:
            self._flush(label)

    def compute(self) -> dict[str, float]:
        """``grad_norm/log_mean``, ``…/log_std`` and ``…/log_max`` of the epoch, and start anew."""
        values: dict[str, float] = {}
        for label in self._pending:
            self._flush(label)
            metric = self._metrics[label]
            result = metric.compute()
            for name in ("mean", "std", "max"):
                values[metric_key("grad_norm", label, f"log_{name}")] = result[name].item()
            metric.reset()
        return values

    def _flush(self, label: str) -> None:
        if label not in self._metrics:
            # Every rank has the same norms, and one whose guard is off would be waited for in vain.
            self._metrics[label] = LogNormStatistics(sync_on_compute=False)
        metric = self._metrics[label]
        pending = self._pending[label]
        if pending:
            metric.update(torch.tensor(pending))
            pending.clear()
