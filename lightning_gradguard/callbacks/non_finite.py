"""Look again at the batch of a step that was not finite, before its update."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_gradguard.dry_run.non_finite import locate_non_finite
from lightning_gradguard.guard import GuardEngine

logger = logging.getLogger("lightning_gradguard")

# Times that it is done in a fit: each costs about two steps, of a run that cannot go on like that.
_MOST_SEARCHES = 5

# State of torch's generators on the CPU and on the device of the model, if that is another.
_RandomState = tuple[Tensor, Tensor | None]


class OriginSearch:
    """Remembers the batch of the step under way, and finds in it where NaN or Inf came from.

    Of a step that accumulates the gradients of several batches it knows the last one only.
    """

    def __init__(self) -> None:
        self._left = _MOST_SEARCHES
        self._current: tuple[Any, int, _RandomState] | None = None

    def remember(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take in a batch, with the random numbers that come next; nothing is copied."""
        if self._left and module.automatic_optimization and batch is not None:
            self._current = (batch, batch_idx, _random_state(module.device))

    def forget(self) -> None:
        """Let go of the batch."""
        self._current = None

    def look(self, module: LightningModule, engine: GuardEngine) -> None:
        """Tell ``engine`` where the step under way was first not finite, if it can be found."""
        if self._current is None:
            return
        batch, batch_idx, random_state = self._current
        self._current = None
        self._left -= 1
        try:
            with _random_numbers_from(random_state, module.device):
                origin = locate_non_finite(module, batch, batch_idx=batch_idx)
        except Exception as error:  # noqa: BLE001 - no reason not to go on training
            self._left = 0
            logger.warning(
                "Where a loss or gradient is first not finite cannot be looked for: %s", error
            )
            return
        finally:
            engine.discard()
        if origin is not None:
            engine.explain(origin)


def _random_state(device: torch.device) -> _RandomState:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


@contextlib.contextmanager
def _random_numbers_from(state: _RandomState, device: torch.device) -> Iterator[None]:
    before = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: _RandomState, device: torch.device) -> None:
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
