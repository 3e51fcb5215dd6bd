"""What is known about the model and its optimizer beside the measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelFacts:
    """Facts by which remedies are chosen and ranked; every one may be missing.

    Attributes:
        optimizer: Class name of the optimizer, ``"AdamW"``.
        lr: Learning rate of its first group, before any scheduler moved it.
        momentum: Momentum of its first group, 0 if it has none.
        weight_decay: Of its first group.
        kinds: Module path to kind, in the order of registration, of modules without children:
            ``"linear"``, ``"conv"``, ``"embedding"``, ``"lstm"``, ``"gru"``, ``"rnn"``,
            ``"batch_norm"``, ``"layer_norm"``, ``"dropout"``, ``"attention"``; activations in lower
            case (``"relu"``, ``"sigmoid"``); ``"other"``. Also stacks, ``"dilated"``.
        training: Module path to whether it is in train mode, for normalization and dropout.
        precision: ``"32"``, ``"bf16"``, ``"16"``, ... as far as known; empty if not.
        optimizers: Optimizers of the run. With several, as in a GAN, a loss is part of a game: that
            it rises or stays says nothing.
        guarded: Whether the guard clips, bounds and drops steps of this run already.
        planned_steps: Optimizer steps that the run is planned to take; ``None`` if not known.

    Example:
        >>> facts = ModelFacts(optimizer="SGD", lr=0.1, kinds={"net.0": "linear", "net.1": "relu"})
        >>> facts.of_kind("relu", "gelu")
        ('net.1',)
    """

    optimizer: str = ""
    lr: float = math.nan
    momentum: float = 0.0
    weight_decay: float = 0.0
    kinds: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, bool] = field(default_factory=dict)
    precision: str = ""
    optimizers: int = 1
    guarded: bool = False
    planned_steps: int | None = None

    def of_kind(self, *kinds: str) -> tuple[str, ...]:
        """Paths of the modules of these kinds, in the order of registration."""
        return tuple(path for path, kind in self.kinds.items() if kind in kinds)
