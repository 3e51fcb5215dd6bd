"""What the Trainer's loggers get of a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_gradguard.callbacks.surroundings import logged_axes
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record.metrics import (
    MAX_LAYERS,
    MAX_TIMES,
    count_metrics,
    depth_within,
    inspection_metrics,
    layer_metrics,
    layer_updates,
    step_metrics,
    time_metrics,
)

logger = logging.getLogger("lightning_gradguard")


class StepLog:
    """Makes metrics of what an engine knows, with a bounded number of keys.

    Args:
        layer_depth: Components of the module path that make a layer; ``None`` for the whole path,
            or as many as leave at most 250 layers.
        optimizers: How many share the keys.
    """

    def __init__(self, layer_depth: int | None = None, optimizers: int = 1) -> None:
        self._asked = layer_depth
        self._most_layers = max(MAX_LAYERS // max(optimizers, 1), 1)
        self._most_times = max(MAX_TIMES // max(optimizers, 1), 1)
        self._depths: dict[str, int | None] = {}
        # Steps of what was logged last.
        self._measured: dict[str, int] = {}
        self._inspected: dict[str, int] = {}

    def metrics(self, engine: GuardEngine) -> dict[str, float]:
        """Metrics of the last step of ``engine`` but those of layers; none before its first."""
        recorder = engine.recorder
        if recorder.last is None or engine.last_norms is None or not engine.active:
            return {}
        label = recorder.label
        return {
            **step_metrics(recorder.last, protecting=engine.mode == "protect", label=label),
            **count_metrics(engine.counts, label),
            **time_metrics(recorder.latest_readings[: self._most_times], label),
        }

    def layers(self, engine: GuardEngine) -> dict[str, float]:
        """What is known of each layer since it was logged last: norms, and a look at them."""
        label, norms, step = engine.recorder.label, engine.last_norms, engine.last_norms_step
        if engine.recorder.last is None or norms is None or not engine.active:
            return {}
        if step == self._measured.get(label):  # another optimizer's step
            return {}
        self._measured[label] = step
        if label not in self._depths:
            depth = self._asked or depth_within(norms.names, self._most_layers)
            self._depths[label] = depth
        layers = norms.layers(self._depths[label])
        return {**layer_metrics(self._first(layers), label), **self._of_inspection(engine)}

    def _of_inspection(self, engine: GuardEngine) -> dict[str, float]:
        """Metrics of the newest inspection, where it has come since values were logged last."""
        inspection, label = engine.recorder.inspection, engine.recorder.label
        if inspection is None or self._inspected.get(label) == inspection.step:
            return {}
        self._inspected[label] = inspection.step
        updates = layer_updates(inspection, self._depths[label])
        return inspection_metrics(inspection, self._first(updates), label)

    def _first(self, values: dict[str, float]) -> dict[str, float]:
        """Who has named a depth gets all layers; otherwise a flat model may still have too many."""
        if self._asked is not None or len(values) <= self._most_layers:
            return values
        return dict(list(values.items())[: self._most_layers])


class LayerRows:
    """Hands many values of a step to the loggers, where ``log_dict`` would take too long.

    That takes a quarter of a millisecond a key, more on each step of the rest of the epoch, and
    logs an old value again where there is no new one. Here they go to the loggers in one call, as
    a row of their own, and to where other callbacks look for what is logged. A logger that fails
    is told of once and gets no more of them; nothing is raised.
    """

    def __init__(self) -> None:
        self._failed: list[Logger] = []

    def log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Log values of the step that is over.

        Args:
            trainer: Its Trainer, at a step at which it logs.
            values: By key.
        """
        if not values:
            return
        tensors = {key: torch.tensor(value) for key, value in values.items()}
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        axes, step = logged_axes(trainer)
        for one in trainer.loggers:
            if not any(one is failed for failed in self._failed):
                self._hand(one, {**axes, **values}, step)

    def _hand(self, one: Logger, row: dict[str, float], step: int) -> None:
        try:
            one.log_metrics(row, step=step)
        except Exception as error:  # noqa: BLE001 - no reason to leave the run unguarded
            self._failed.append(one)
            logger.warning("%s gets no more layers of the run: %s", type(one).__name__, error)
