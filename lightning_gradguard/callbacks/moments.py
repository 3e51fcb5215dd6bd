"""The batches of the last steps, and the random numbers before each."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.incidents import Moment, RandomState


class Moments:
    """Remembers without a copy.

    Of a step that accumulates the gradients of several batches it knows the last one only.

    Args:
        steps: Steps that are remembered once they are over, the one under way included.

    Attributes:
        current: The batch under way.
    """

    def __init__(self, steps: int = 1) -> None:
        self.current: Moment | None = None
        self._last: deque[Moment] = deque(maxlen=steps)

    def remember(
        self, module: LightningModule, batch: Any, batch_idx: int, engines: Sequence[GuardEngine]
    ) -> None:
        """Take in a batch before its forward pass."""
        self.current = None
        if batch is None:  # the training step draws its own
            return
        steps = tuple(engine.step for engine in engines)
        self.current = Moment(batch, batch_idx, RandomState.now(module.device), steps)
        if self._last and self._last[-1].steps == steps:
            self._last.pop()
        self._last.append(self.current)

    def tell(self, loss: Tensor | None) -> None:
        """Take in the loss of the batch under way."""
        if self.current is not None:
            self.current.loss = loss

    def at(self, number: int, step: int) -> Moment | None:
        """The batch of a step, if it is remembered.

        Args:
            number: Which optimizer's step.
            step: Which step.
        """
        moments = list(self._last)
        after = [moment.steps[number] for moment in moments[1:]]
        for moment, until in zip(moments, [*after, step + 1], strict=False):
            if moment.steps[number] <= step < until:
                return moment
        return None

    def forget(self) -> None:
        """The batch under way is over."""
        self.current = None
        if self._last.maxlen == 1:
            self._last.clear()

    def clear(self) -> None:
        """Let go of all batches."""
        self.current = None
        self._last.clear()
