"""What all guards on one Trainer ask for, together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

# What an engine does about a step; an alert only tells of it.
RUNGS = ("clip", "cap", "skip", "backoff", "rollback", "vanishing", "boost")


class Asking(Protocol):
    """A callback that asks for responses."""

    def asks(self) -> Mapping[str, Any]:
        """What the user has asked for by it; ``None`` leaves a response out."""

    def offers(self) -> Mapping[str, Any]:
        """What is done unless another callback on the Trainer asks for something else."""


def asked_for(callbacks: Iterable[Asking]) -> dict[str, Any]:
    """The responses of one engine, in whatever order the callbacks are listed.

    Args:
        callbacks: All guards on the Trainer.

    Raises:
        ValueError: If two of them ask for different responses of one kind.
    """
    callbacks = list(callbacks)
    offered: dict[str, Any] = {}
    for callback in callbacks:
        offered.update(callback.offers())
    asked: dict[str, Any] = {}
    by: dict[str, str] = {}
    for callback in callbacks:
        name = type(callback).__name__
        for kind, response in callback.asks().items():
            if kind in asked and asked[kind] != response:
                raise ValueError(
                    f"{kind} must be set by one callback on a Trainer, got {asked[kind]!r} from "
                    f"{by[kind]} and {response!r} from {name}"
                )
            asked[kind], by[kind] = response, name
    return {**offered, **asked}
