"""What the ladder does, in one sentence each, with the numbers that it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_gradguard.respond.actions import Action, ActionKind


def skipped(step: int, total_norm: float, median: float | None) -> Action:
    """A step was dropped.

    Args:
        step: Which one.
        total_norm: Its gradient norm.
        median: The run's own median gradient norm, if known.
    """
    size = f"{total_norm:.3g}"
    if median is not None and math.isfinite(total_norm):
        size += f", {total_norm / median:.3g} times its median"
    message = (
        f"Step {step} skipped, because the gradient norm was {size}; "
        "weights and optimizer state are untouched."
    )
    return Action(ActionKind.SKIP, step, message, {"total_norm": total_norm})


def followed(step: int, rate: float, scale: float, steps_left: int) -> Action:
    """The learning rate leaps to ``rate``, and is followed by degrees."""
    message = (
        f"The learning rate leaps to {rate:.3g} at step {step}; it is followed over the "
        f"next {steps_left} steps, as a warm-up would have led to it."
    )
    return Action(ActionKind.BACK_OFF, step, message, {"lr_scale": scale})


def cut(step: int, scale: float, why: str) -> Action:
    """The learning rate was cut to ``scale`` of its schedule.

    Example:
        >>> cut(3, 0.5, "the run is diverging").message
        'Learning rate cut to 0.5 of its schedule, because the run is diverging.'
    """
    message = f"Learning rate cut to {scale:.3g} of its schedule, because {why}."
    return Action(ActionKind.BACK_OFF, step, message, {"lr_scale": scale})


def recovered(step: int, scale: float) -> Action:
    """The learning rate is at ``scale`` of its schedule again."""
    message = f"Learning rate recovered to {scale:.3g} of its schedule."
    return Action(ActionKind.RECOVER, step, message, {"lr_scale": scale})


def tightened(step: int, ratio: float, why: str) -> Action:
    """The cap on updates was tightened to ``ratio``."""
    message = f"Updates capped at {ratio:.2%} of each tensor's norm per step, because {why}."
    return Action(ActionKind.TIGHTEN, step, message, {"max_ratio": ratio})


def put_back(step: int, to: int, why: str, also: str, numbers: Mapping[str, float]) -> Action:
    """Earlier weights were put back.

    Args:
        step: After which step.
        to: The step whose weights they are.
        why: In words.
        also: What else was done, in words; empty for nothing.
        numbers: Of what else was done.
    """
    message = f"Step {step}: weights, optimizer and buffers put back to step {to}, because {why}"
    message += f"; {also}." if also else "."
    return Action(ActionKind.ROLL_BACK, step, message, {"to_step": float(to), **numbers})


def stopped(
    step: int, reason: str, to: int | None, rollbacks: int, numbers: Mapping[str, float]
) -> Action:
    """The run is asked to stop.

    Args:
        step: After which step.
        reason: In words.
        to: The step whose weights are put back; ``None`` for none.
        rollbacks: Times that weights were put back before.
        numbers: That it rests on.
    """
    message = f"Stopping at step {step}: {reason}"
    if rollbacks:
        message += f", and going back {rollbacks} times has not helped"
    message += "."
    if to is not None:
        message += f" Weights, optimizer and buffers are put back to step {to}."
    return Action(ActionKind.STOP, step, message, numbers)
