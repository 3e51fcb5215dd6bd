"""Pictures and histograms as W&B takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradguard.record.metrics import metric_key
from lightning_gradguard.record.run_history import Floats, OptimizerHistory

Picture = npt.NDArray[np.uint8]

# Pictures of one key, and modules with a histogram of their own, each time that a run is shown.
MAX_PICTURES = 8
# W&B refuses a histogram of more bins.
MAX_BINS = 512


def images(pictures: Mapping[str, Picture], step: int, label: str = "") -> dict[str, Any]:
    """Pictures by what they show, ``grad_maps/grad_norm``, each with its own name below it.

    So many modules there are, so few keys: a dashboard can name them before there is a run.

    Args:
        pictures: By key, ``"grad_time/encoder.rnn/heat_map"``, of one shape ``(H, W, 3)``, as W&B
            distorts those of unequal sizes. The first eight that show the same are taken.
        step: Step of which they are.
        label: Name of the optimizer.
    """
    import wandb

    groups: dict[str, dict[str, Picture]] = {}
    for name, picture in pictures.items():
        group = groups.setdefault(metric_key("grad_maps", label, name.split("/", 1)[0]), {})
        if len(group) < MAX_PICTURES:
            group[name] = picture
    return {
        key: [
            wandb.Image(picture, caption=f"{name}, step {step}") for name, picture in group.items()
        ]
        for key, group in groups.items()
    }


def histograms(history: OptimizerHistory) -> dict[str, Any]:
    """Where the gradient is now: norms as weights of the layers, and of the timesteps.

    W&B draws the histograms of one key over the steps as a heat map.

    Args:
        history: Of one optimizer.
    """
    import wandb

    values = {}
    if len(history.layers.steps):
        norms = history.layers.values[-1]
        edges = np.arange(len(norms) + 1.0)
        values[metric_key("grad_histograms", history.label, "layers")] = pooled(norms, edges)
    profiled = [reading for reading in history.latest_times if reading.profile]
    for reading in profiled[:MAX_PICTURES]:
        profile = np.asarray(reading.profile)
        edges = np.linspace(0.0, max(reading.timesteps, len(profile)), len(profile) + 1)
        key = metric_key("grad_histograms", history.label, "time", reading.name)
        values[key] = pooled(profile, edges)
    return {key: wandb.Histogram(np_histogram=value) for key, value in values.items()}


def pooled(norms: Floats, edges: Floats) -> tuple[Floats, Floats]:
    """Weights and edges of at most 512 bins; what is not finite weighs nothing.

    Norms that share a bin are put together as the norm of all of them.

    Args:
        norms: One for each bin, shape ``(B,)``.
        edges: Shape ``(B + 1,)``.

    Example:
        >>> weights, edges = pooled(np.ones(1024), np.arange(1025.0))
        >>> len(weights), float(edges[-1]), bool(np.allclose(weights, 2.0**0.5))
        (512, 1024.0, True)
    """
    weights = np.where(np.isfinite(norms), norms, 0.0)
    if len(weights) <= MAX_BINS:
        return weights, edges
    starts = np.linspace(0, len(weights), MAX_BINS, endpoint=False).astype(np.intp)
    squares = np.add.reduceat(np.square(weights), starts)
    return np.sqrt(squares), np.append(edges[starts], edges[-1])
