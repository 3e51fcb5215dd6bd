"""Arguments that the examples share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """What takes whole numbers from ``least`` on, as a type for argparse."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return number


def add_training(
    parser: argparse.ArgumentParser, steps: int, quick_steps: int, output: str, least: int = 1
) -> None:
    """Declare how long is trained, from which seed, and where the picture goes.

    Args:
        parser: Of the example.
        steps: Training steps of each net.
        quick_steps: The same for a quick look.
        output: The picture.
        least: Steps that there must be.
    """
    parser.add_argument("--steps", type=at_least(least), help=f"training steps of each ({steps})")
    parser.add_argument("--seed", type=int, default=0, help="weights and data order (0)")
    parser.add_argument("--output", type=Path, default=Path(output), help="where the PNG goes")
    parser.add_argument("--quick", action="store_true", help=f"{quick_steps} steps")


def chosen_steps(options: argparse.Namespace, steps: int, quick_steps: int) -> int:
    """How many steps were asked for."""
    return int(options.steps or (quick_steps if options.quick else steps))
