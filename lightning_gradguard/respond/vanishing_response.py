"""What is done against vanishing gradients around the steps of one optimizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnose import Finding, Pathology
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.readings import Inspection
from lightning_gradguard.respond.actions import Action
from lightning_gradguard.respond.boost_enforcement import UpdateEnlarger
from lightning_gradguard.respond.layer_boost import LayerBoost, LayerBoostState
from lightning_gradguard.respond.vanishing_regularizer import Regularization, VanishingRegularizer

logger = logging.getLogger("lightning_gradguard")


class VanishingResponse:
    """Carries out a regularizer and a boost of layers; without either it does nothing at all.

    Call :meth:`follow` first, then around every step :meth:`add_gradient`, :meth:`before_step`,
    :meth:`after_step` and :meth:`observe`.

    Args:
        model: The model.
        regularizer: For recurrent modules; ``None`` for none.
        boost: For layers that get too little; ``None`` for none.
        silent: Do not say what is left out (for all ranks but one).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the regularizer names modules that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizer: VanishingRegularizer | None,
        boost: LayerBoost | None,
        *,
        silent: bool = False,
    ) -> None:
        self._model = model
        self._silent = silent
        self._several = _processes() > 1
        if regularizer is not None and self._several:
            self._tell(
                "VanishingRegularizer is left out: in a run of several processes each would add "
                "the gradient of its own batch, and their weights would drift apart."
            )
            regularizer = None
        self._settings = regularizer
        self._pull: Regularization | None = None
        self._boost = None if boost is None else LayerBoostState(boost)
        self._enlarger: UpdateEnlarger | None = None
        self._numbers: dict[str, int] = {}

    def follow(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """The optimizer has these parameters from now on; ``names`` are those of inspections."""
        owned = [p for p in parameters if isinstance(p, nn.Parameter)]
        if self._pull is not None:
            self._pull.follow(owned)
        elif self._settings is not None:
            self._pull = Regularization(self._settings, self._model, owned, silent=self._silent)
        if self._boost is None:
            return
        if any(local_tensor(p) is not p for p in parameters):
            self._boost = self._enlarger = None
            self._tell(
                "LayerBoost is left out: parameters are sharded, and each process sees how far the "
                "updates of its own shards go."
            )
            return
        self._numbers = {name: number for number, name in enumerate(names)}
        self._enlarger = UpdateEnlarger(parameters)

    def add_gradient(self, step: int, scale: float) -> None:
        """Add what the regularizer asks for; see :meth:`Regularization.add_gradient`."""
        if self._pull is not None:
            self._pull.add_gradient(step, scale)

    def before_step(self, *, inspecting: bool) -> None:
        """Prepare for the coming step.

        Args:
            inspecting: Whether layers are still looked at.

        Raises:
            RuntimeError: If they are not, while other processes go on by what they see.
        """
        if self._boost is None or self._enlarger is None:
            return
        if self._several and not inspecting:
            raise RuntimeError("layers, by which updates are enlarged, can no longer be looked at")
        boosts = self._boost.boosts.items()
        self._enlarger.begin(
            {self._numbers[name]: boost for name, boost in boosts if name in self._numbers}
        )

    def after_step(self, max_ratio: float) -> None:
        """Enlarge the updates of the step just taken, up to the cap ``max_ratio``."""
        if self._enlarger is not None:
            self._enlarger.enlarge(max_ratio)

    def observe(
        self, step: int, findings: Sequence[Finding], inspection: Inspection | None
    ) -> list[Action]:
        """Take in what has become known; returns what changes from ``step``, the next one, on.

        Args:
            step: The next step.
            findings: All so far.
            inspection: The look at the layers that has come, if any.
        """
        if self._boost is None:
            return []
        # Depth is judged by the gradients, weights and loss that all processes have in common.
        shared = [
            f
            for f in findings
            if f.until is None
            and not (self._several and f.local and f.pathology is not Pathology.VANISHING_IN_DEPTH)
        ]
        return self._boost.observe(step, shared, inspection)

    def pause(self) -> None:
        """Do not watch forward and backward passes until :meth:`resume`."""
        if self._pull is not None:
            self._pull.pause()

    def resume(self) -> None:
        """Watch them again."""
        if self._pull is not None:
            self._pull.resume()

    def discard(self) -> None:
        """Forget what passes since the last step have left."""
        if self._pull is not None:
            self._pull.discard()

    def close(self) -> None:
        """Take all hooks off the model, and let go of all copies."""
        if self._pull is not None:
            self._pull.close()
        self._enlarger = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {"boost": None if self._boost is None else self._boost.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from a saved state at ``step``; what was not in use then starts afresh."""
        if self._pull is not None:
            self._pull.go_on_from(step)
        if self._boost is not None and state.get("boost") is not None:
            self._boost.load_state_dict(state["boost"])

    def _tell(self, sentence: str) -> None:
        if not self._silent:
            logger.warning("%s", sentence)


def _processes() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
