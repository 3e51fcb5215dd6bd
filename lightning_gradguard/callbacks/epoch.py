"""Gradient norms, and gradients through time, over an epoch."""

from __future__ import annotations

import math
from itertools import islice

import torch

from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record.metrics import MAX_TIMES, metric_key, modules_of_one_part
from lightning_gradguard.record.statistics import LogNormStatistics
from lightning_gradguard.record.time_statistics import TimeDecayStatistics

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


class EpochTime:
    """Aggregates the readings through time of an epoch, for each module, layer and direction."""

    def __init__(self) -> None:
        self._metrics: dict[tuple[str, str, str], TimeDecayStatistics] = {}
        self._last_step: dict[str, int] = {}
        self._over = False

    @property
    def metrics(self) -> dict[str, TimeDecayStatistics]:
        """Those of the last epoch by name; they start anew with the first reading of the next.

        A module that was measured exactly by layer and direction is here in no other way.
        """
        split = {(label, module) for label, module, part in self._metrics if part}
        return {
            "/".join(filter(None, key)): metric
            for key, metric in self._metrics.items()
            if key[2] or key[:2] not in split
        }

    def add(self, engine: GuardEngine) -> None:
        """Take in the readings of ``engine`` that are new."""
        label = engine.recorder.label
        for reading in engine.recorder.readings_since(self._last_step.get(label, -1)):
            self._last_step[label] = reading.step
            self._metric((label, reading.module, reading.part)).update(reading)

    def compute(self) -> dict[str, float]:
        """``grad_time/<module>/decay_rate_epoch`` and ``…/horizon_epoch``, and start anew."""
        self._over = True
        values = {}
        metrics = self.metrics
        alone = modules_of_one_part(metrics)
        for name, metric in islice(metrics.items(), MAX_TIMES):
            result = metric.compute()
            for field in ("decay_rate", "horizon"):
                key = metric_key("grad_time", alone.get(name, name), f"{field}_epoch")
                values[key] = result[field].item()
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def _metric(self, key: tuple[str, str, str]) -> TimeDecayStatistics:
        if self._over:
            self._metrics, self._over = {}, False
        if key not in self._metrics:
            # Every rank reads its own sequences, at steps of its own.
            self._metrics[key] = TimeDecayStatistics(sync_on_compute=False)
        return self._metrics[key]
