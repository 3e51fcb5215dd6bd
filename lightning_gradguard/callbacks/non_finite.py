"""Look again at the batch of a step that was not finite, before its update."""

from __future__ import annotations

import logging

from lightning.pytorch import LightningModule

from lightning_gradguard.callbacks.moments import Moments
from lightning_gradguard.dry_run.non_finite import locate_non_finite
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.incidents.randomness import random_numbers_from

logger = logging.getLogger("lightning_gradguard")

# Times that it is done in a fit: each costs about two steps, of a run that cannot go on like that.
_MOST_SEARCHES = 5


class OriginSearch:
    """Finds in the batch of the step under way where NaN or Inf came from.

    Args:
        moments: Knows the batch.
    """

    def __init__(self, moments: Moments) -> None:
        self._left = _MOST_SEARCHES
        self._moments = moments

    def look(self, module: LightningModule, engine: GuardEngine) -> None:
        """Tell ``engine`` where the step under way was first not finite, if it can be found."""
        moment = self._moments.current
        if moment is None or not self._left or not module.automatic_optimization:
            return
        self._left -= 1
        try:
            with random_numbers_from(moment.random, module.device):
                origin = locate_non_finite(module, moment.batch, batch_idx=moment.batch_idx)
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
