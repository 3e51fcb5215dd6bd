"""Keeps the copies of one optimizer's weights within their bounds, and looks at the weights."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn
from torch.optim import Optimizer

from lightning_gradguard.respond.copies import all_finite
from lightning_gradguard.respond.rollback import WeightRollback
from lightning_gradguard.respond.snapshots import WeightSnapshots

logger = logging.getLogger("lightning_gradguard")


class WeightKeeper:
    """Copies weights when told to, unless they are too large, and finds out when they are broken.

    Args:
        model: Whose buffers are copied.
        optimizer: Whose parameters and state are copied.
        settings: How much memory the copies may take.
        trained_elsewhere: Parameters that other optimizers update.
        alone: Whether this is the only process. Several have to go on alike, so where one of them
            cannot copy its weights that is an error.
        silent: Do not say that nothing is copied (for all ranks but one).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: WeightRollback,
        *,
        trained_elsewhere: Collection[nn.Parameter] = (),
        alone: bool,
        silent: bool,
    ) -> None:
        self._optimizer = optimizer
        self._max_bytes = settings.max_bytes
        self._alone = alone
        self._silent = silent
        self._snapshots: WeightSnapshots | None = WeightSnapshots(
            model, optimizer, trained_elsewhere
        )
        self._unread = False
        self._judges: bool | None = None  # not known before the first copy

    @property
    def active(self) -> bool:
        """Whether weights are copied at all."""
        return self._snapshots is not None

    @property
    def newest(self) -> int | None:
        """Step of the newest copy; ``None`` if there is none."""
        return self._snapshots.newest if self._snapshots is not None else None

    @property
    def step(self) -> int | None:
        """Step of the copy to go back to; ``None`` if there is none."""
        return self._snapshots.step if self._snapshots is not None else None

    def take(self, step: int) -> bool:
        """Copy the weights as they are before the update of ``step``.

        Returns:
            Whether weights are still copied.
        """
        if self._snapshots is None:
            return False
        needed = self._snapshots.bytes_of_two
        if needed > self._max_bytes:
            self._leave_out(
                f"two copies of weights and optimizer state take {needed / 2**20:,.0f} MiB, and "
                f"max_bytes allows {self._max_bytes / 2**20:,.0f} MiB"
            )
            return False
        try:
            self._snapshots.take(step)
        except Exception as error:
            if not self._alone:
                raise
            self._leave_out(f"weights cannot be copied ({type(error).__name__}: {error})")
            return False
        self._unread = True
        return True

    def _leave_out(self, reason: str) -> None:
        self._snapshots = None
        if not self._silent:
            logger.warning("GradGuard leaves out going back to earlier weights: %s.", reason)

    def finds_damage(self, step: int, *, look: bool) -> bool:
        """Whether the weights hold NaN, Inf or what is out of all proportion to their copy.

        Weights that hold NaN or Inf from the start, as a mask may, are not judged.

        Args:
            step: The step that is accounted for. What the newest copy holds is read with the step
                it was made at, when it has surely arrived.
            look: Whether to look at the weights as they are now, too.
        """
        snapshots = self._snapshots
        if snapshots is None:
            return False
        damaged = False
        if self._unread and snapshots.newest is not None and step >= snapshots.newest:
            self._unread = False
            finite = snapshots.newest_is_finite()
            if self._judges is None:
                self._judges = finite
            damaged = not finite
        if look and self._judges and not damaged:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            finite_now = all_finite(parameters)
            damaged = finite_now is not None and not bool(finite_now)
            damaged = damaged or snapshots.far_from_copy()
        return damaged and self._judges is True

    def restore(self) -> None:
        """Put the weights back to the copy of :attr:`step`."""
        if self._snapshots is not None:
            self._snapshots.restore()
            self._unread = False
