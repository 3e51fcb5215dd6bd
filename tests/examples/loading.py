"""The examples as modules, the pictures that they leave, and readings to draw."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lightning_gradguard.readings import TimeReading

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, *needs: str) -> ModuleType:
    """An example, whose neighbors can be imported as when it is run.

    Args:
        name: Of its file.
        needs: Packages that it needs beside matplotlib.
    """
    for package in ("matplotlib", *needs):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


def pixels(path: Path) -> np.ndarray:
    """A picture; a blank one has no spread."""
    return importlib.import_module("matplotlib.image").imread(path)


def geometric_reading(
    rate: float, step: int = 0, *, timesteps: int, name: str = "rnn"
) -> TimeReading:
    """What a layer leaves whose gradient changes by a factor of e^rate in each step back."""
    profile = tuple(0.01 * math.exp(rate * lag) for lag in reversed(range(timesteps)))
    return TimeReading(
        name, "l0", "exact", "tanh", timesteps, 32, rate, recency=0.5, profile=profile, step=step
    )
