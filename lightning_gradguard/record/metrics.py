"""Metric keys, as every logger gets them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from lightning_gradguard.measure import layer_index
from lightning_gradguard.measure.updates import RMS_FLOOR
from lightning_gradguard.readings import Inspection, TimeReading
from lightning_gradguard.record.history import StepRecord

# Loggers and their pages become slow with thousands of keys: a model of any size has fewer than
# 1,000. Each layer takes two of them, each module that is measured through time six.
MAX_LAYERS = 250
MAX_TIMES = 50

_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_./]")
# Keys under ``grad_norm/`` that a layer of the same name must not take.
_RESERVED = frozenset({"total", "total_clipped", "log_mean", "log_std", "log_max", "heat_map"})


def metric_key(*parts: str) -> str:
    """Join parts to a key of letters, digits, ``_``, ``.`` and ``/`` only.

    Example:
        >>> metric_key("grad_norm", "encoder.rnn:0")
        'grad_norm/encoder.rnn_0'
    """
    return "/".join(_NOT_ALLOWED.sub("_", part) for part in parts if part)


def depth_within(names: Iterable[str], most: int = MAX_LAYERS) -> int | None:
    """The depth of the module path down to which there are at most so many layers, or 1.

    Args:
        names: Names of the parameters.
        most: How many layers there may be.

    Returns:
        ``None`` if there are no more with the whole path.

    Example:
        >>> names = [f"blocks.{block}.{layer}.weight" for block in range(200) for layer in "abcd"]
        >>> depth_within(names), depth_within(names, most=800)
        (2, None)
    """
    names = list(names)
    if len(layer_index(names)[0]) <= most:
        return None
    depth = max(name.count(".") for name in names)
    while depth > 1 and len(layer_index(names, depth)[0]) > most:
        depth -= 1
    return max(depth, 1)


def step_metrics(row: StepRecord, *, protecting: bool, label: str = "") -> dict[str, float]:
    """What one step logs: the norm, and with responses on what they did.

    Args:
        row: The step.
        protecting: Whether responses are on.
        label: Name of the optimizer, put into the keys where there are several.
    """
    metrics = {"grad_norm/total": row.total_norm}
    if protecting:
        metrics |= {
            "grad_norm/total_clipped": row.total_norm * row.clip_coef,
            "gradguard/clip_threshold": row.clip_threshold,
            "gradguard/clip_coef": row.clip_coef,
            "gradguard/max_ratio": row.max_ratio,
            "gradguard/capped_tensors": float(row.capped_tensors),
            "gradguard/lr_scale": row.lr_scale,
        }
    return {_labelled(key, label): value for key, value in metrics.items()}


def count_metrics(counts: Mapping[str, int], label: str = "") -> dict[str, float]:
    """Running counts: skipped steps, findings and rollbacks."""
    keys = {name: f"gradguard/{name}" for name in ("skipped_steps", "findings", "rollbacks")}
    return {_labelled(keys[k], label): float(v) for k, v in counts.items() if k in keys}


def layer_metrics(layers: Mapping[str, float], label: str = "") -> dict[str, float]:
    """One norm per layer; a layer called ``total`` becomes ``total_``.

    Example:
        >>> layer_metrics({"encoder.rnn": 0.5, "total": 2.0})
        {'grad_norm/encoder.rnn': 0.5, 'grad_norm/total_': 2.0}
    """
    return {
        _labelled(metric_key("grad_norm", f"{name}_" if name in _RESERVED else name), label): norm
        for name, norm in layers.items()
    }


def time_metrics(readings: Iterable[TimeReading], label: str = "") -> dict[str, float]:
    """Decay rate, half-life, horizon and recency of each module; what is not known is left out.

    A module of one layer and direction goes by its path alone: ``grad_time/rnn/decay_rate``.

    Example:
        >>> rnn = TimeReading("rnn", "", "exact", decay_rate=-0.1)
        >>> [round(value, 2) for value in time_metrics([rnn]).values()]
        [-0.1, 6.93, 69.08]
    """
    readings = list(readings)
    alone = modules_of_one_part(reading.name for reading in readings)
    values = {
        metric_key("grad_time", alone.get(reading.name, reading.name), name): getattr(reading, name)
        for reading in readings
        for name in ("decay_rate", "half_life", "horizon", "recency")
    }
    return {_labelled(key, label): v for key, v in values.items() if math.isfinite(v)}


def layer_updates(inspection: Inspection, depth: int | None = None) -> dict[str, float]:
    """The relative update of each layer, ‖ΔW‖ / ‖W‖ over its parameters; unknown ones left out.

    Args:
        inspection: A look at every layer.
        depth: Components of the module path that make a layer; default: the whole path.
    """
    known = [p for p in inspection.parameters if math.isfinite(p.update_ratio * p.weight_norm)]
    layers, numbers = layer_index((p.name for p in known), depth)
    moved, norms = [0.0] * len(layers), [0.0] * len(layers)
    for number, parameter in zip(numbers, known, strict=True):
        norm = max(parameter.weight_norm, RMS_FLOOR * math.sqrt(parameter.elements))
        moved[number] = math.hypot(moved[number], parameter.update_ratio * norm)
        norms[number] = math.hypot(norms[number], norm)
    known_layers = zip(layers, moved, norms, strict=True)
    return {layer: change / norm for layer, change, norm in known_layers if norm > 0.0}


def inspection_metrics(
    inspection: Inspection, updates: Mapping[str, float], label: str = ""
) -> dict[str, float]:
    """The relative update of each layer, and how fast the gradient changes through them.

    Args:
        inspection: A look at every layer.
        updates: Of the layers that are logged, see :func:`layer_updates`.
        label: Name of the optimizer where there are several.

    Example:
        >>> from lightning_gradguard.readings import ParameterReading
        >>> weight = ParameterReading("net.0.weight", weight_norm=2.0, update_ratio=0.01)
        >>> inspection = Inspection(0, (weight,), depth_slope=-0.1)
        >>> inspection_metrics(inspection, layer_updates(inspection))
        {'update_ratio/net.0': 0.01, 'grad_depth/slope': -0.1}
    """
    values = {metric_key("update_ratio", layer): ratio for layer, ratio in updates.items()}
    if math.isfinite(inspection.depth_slope):
        values["grad_depth/slope"] = inspection.depth_slope
    return {_labelled(key, label): value for key, value in values.items()}


def modules_of_one_part(names: Iterable[str]) -> dict[str, str]:
    """From names of readings to paths of modules, for those that are a module's only part.

    Example:
        >>> modules_of_one_part(["encoder/l0", "encoder/l1", "decoder/l0"])
        {'decoder/l0': 'decoder'}
    """
    modules = [(name, name.rpartition("/")[0] if _is_part(name) else name) for name in names]
    counts = Counter(module for _, module in modules)
    return {name: module for name, module in modules if counts[module] == 1}


def _is_part(name: str) -> bool:
    return re.fullmatch(r"l\d+(_reverse)?", name.rpartition("/")[2]) is not None and "/" in name


def _labelled(key: str, label: str) -> str:
    head, tail = key.split("/", 1)
    return metric_key(head, label, tail)
