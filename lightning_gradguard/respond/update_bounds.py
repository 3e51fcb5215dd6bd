"""The cap on relative updates, each family of optimizers by its cheapest means.

* SGD's update is linear in the gradients, so bounding each tensor's gradient bounds every update,
  and keeps a huge gradient out of the momentum. Nothing is copied.
* Adam and its relatives normalize the gradient: a step is about ``lr`` in each element, whatever
  the gradient. Its size is known beforehand, and only tensors for which it is large are copied.
* Of any other optimizer the last updates are sampled, and tensors near the cap are copied.

All of them can be asked for a few device values to be read along with the gradient norm, so that
the cap needs no host read of its own on a step where it does not bind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.measure import GradNorms
from lightning_gradguard.respond.gradient_bound import GradientBound
from lightning_gradguard.respond.sampled_bound import SampledBound
from lightning_gradguard.respond.step_size_bound import StepSizeBound

__all__ = ["GradientBound", "SampledBound", "StepSizeBound", "UpdateBound", "make_bound"]

# One step of these moves an element by about ``lr``.
_NORMALIZING = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.SparseAdam,
)


class UpdateBound(Protocol):
    """Holds every tensor's update to a share of its norm.

    Attributes:
        large: How many tensors would have moved by more than ``large_ratio`` in the last step.
    """

    large: int | Tensor

    def signal(self, norms: GradNorms) -> Tensor | None:
        """Device values, (K,), that :meth:`before_step` wants to be read, if any."""

    def before_step(
        self, max_ratio: float, coefficient: float | Tensor, seen: Sequence[float]
    ) -> None:
        """Prepare for the coming step.

        Args:
            max_ratio: The cap.
            coefficient: What the gradients are multiplied by because of clipping: one factor, or
                (P,) one for each.
            seen: The latest signal that was read; empty if there is none.
        """

    def after_step(self) -> int | Tensor:
        """Finish the step; returns how many tensors were held back."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


def make_bound(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    *,
    on_device: bool,
    large_ratio: float = math.inf,
    ordinary_ratio: float = 0.0,
    allowances: Sequence[float] = (),
) -> UpdateBound:
    """The bound for this optimizer.

    Args:
        optimizer: Decides on the means; see the module's docstring.
        parameters: Its parameters, each once.
        on_device: Decide on the device, with no host read.
        large_ratio: What counts as a large relative update, whether or not it is held back.
        ordinary_ratio: Where the size of a step is known beforehand, this is what counts as large,
            and what tensors are held to while most of them are not.
        allowances: What each tensor's share is multiplied by: one that must not move as far as the
            others has less than 1. None for 1 for all.
    """
    if isinstance(optimizer, _NORMALIZING) and not _may_leap(optimizer):
        return StepSizeBound(
            optimizer,
            parameters,
            on_device=on_device,
            large_ratio=max(large_ratio, ordinary_ratio),
            ordinary_ratio=ordinary_ratio,
            allowances=allowances,
        )
    kind: type[GradientBound | SampledBound]
    kind = GradientBound if type(optimizer) is torch.optim.SGD else SampledBound
    return kind(
        optimizer,
        parameters,
        on_device=on_device,
        large_ratio=large_ratio,
        allowances=allowances,
    )


def _may_leap(optimizer: Optimizer) -> bool:
    """Whether a normalizing optimizer can keep moving by many times ``lr``: some RMSprop.

    Its momentum adds up whole steps, and a centered second moment of a steady gradient is zero.
    """
    groups = optimizer.param_groups
    return any(group.get("momentum", 0.0) > 0.0 or group.get("centered", False) for group in groups)
