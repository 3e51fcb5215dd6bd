"""Which batch a step was made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_gradguard.callbacks.moments import Moments


class Module(nn.Module):
    device = torch.device("cpu")


def remember(moments: Moments, batch: Any, step: int) -> None:
    module: Any = Module()
    engine: Any = SimpleNamespace(step=step)
    moments.remember(module, batch, step, [engine])


def test_a_step_whose_batch_is_not_known_has_none() -> None:
    """As where the training step draws its own."""
    moments = Moments(steps=3)
    remember(moments, None, 0)
    assert moments.at(0, 0) is None
    moments.clear()
    assert moments.at(0, 5) is None


def test_the_batch_of_each_of_the_last_steps() -> None:
    moments = Moments(steps=3)
    for step in range(5):
        remember(moments, f"batch {step}", step)
        moments.forget()
    found = [moments.at(0, step) for step in range(5)]
    assert [moment and moment.batch for moment in found] == [
        None,
        None,
        "batch 2",
        "batch 3",
        "batch 4",
    ]
