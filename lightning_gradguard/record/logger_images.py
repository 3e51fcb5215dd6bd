"""Pictures, to the loggers that take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]


def log_images(logger: Any, images: Mapping[str, Picture], step: int) -> bool:
    """Hand pictures to a logger through what it offers.

    A logger is known by what it can do and not by its type, so that none need be installed:
    TensorBoard by ``experiment.add_image``, MLflow by ``experiment.log_image`` and a ``run_id``.
    W&B has tables and histograms besides and is served elsewhere. A logger that can do none of it,
    as CSV, or that has nothing but ``log_metrics``, is left alone.

    Args:
        logger: A logger of either Lightning namespace, or anything that looks like one.
        images: RGB pictures by name, each of shape ``(H, W, 3)``.
        step: Step that they belong to.

    Returns:
        Whether the logger took them. What it raises is the caller's.

    Example:
        >>> from types import SimpleNamespace
        >>> taken = []
        >>> def add_image(key, image, global_step, dataformats):
        ...     taken.append((key, image.shape, global_step, dataformats))
        >>> picture = np.zeros((4, 8, 3), np.uint8)
        >>> tensorboard = SimpleNamespace(experiment=SimpleNamespace(add_image=add_image))
        >>> log_images(tensorboard, {"grad_norm/heat_map": picture}, 7), taken
        (True, [('grad_norm/heat_map', (4, 8, 3), 7, 'HWC')])
        >>> log_images(SimpleNamespace(log_metrics=print), {"grad_norm/heat_map": picture}, 7)
        False
    """
    experiment = getattr(logger, "experiment", None)
    if experiment is None or _can(experiment, "alert"):
        return False
    if _can(experiment, "add_image"):
        for key, image in images.items():
            experiment.add_image(key, image, global_step=step, dataformats="HWC")
        return True
    run = getattr(logger, "run_id", None)
    if isinstance(run, str) and _can(experiment, "log_image"):
        for key, image in images.items():
            experiment.log_image(run, image, key=key, step=step)
        return True
    return False


def _can(thing: Any, method: str) -> bool:
    return callable(getattr(thing, method, None))
