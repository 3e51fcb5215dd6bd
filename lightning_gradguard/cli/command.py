"""What a command of the terminal is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class CommandError(Exception):
    """What is wrong with a command, in one sentence."""


@dataclass(frozen=True)
class Command:
    """One command of ``gradguard``.

    Attributes:
        name: What is typed.
        help: Its line in the list of commands.
        description: What it does, in a few sentences.
        example: A line that can be typed.
        add_arguments: Tells a parser its arguments.
        run: Does it; raises :class:`CommandError` where it cannot.
    """

    name: str
    help: str
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def in_one_line(text: object) -> str:
    r"""The text without its line breaks.

    Example:
        >>> in_one_line(ValueError("wrong,\n  so wrong"))
        'wrong, so wrong'
    """
    return " ".join(str(text).split())


@contextmanager
def extra_needed(extra: str) -> Iterator[None]:
    """Say which extra to install where a package that it brings is missing.

    Args:
        extra: Of the optional dependencies in ``pyproject.toml``.

    Raises:
        CommandError: If an import inside fails because the package is not installed.

    Example:
        >>> with extra_needed("report"):
        ...     import no_such_package
        Traceback (most recent call last):
            ...
        lightning_gradguard.cli.command.CommandError: no_such_package is not installed; get it \
with: pip install 'lightning-gradguard[report]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(
            f"{error.name} is not installed; get it with: "
            f"pip install 'lightning-gradguard[{extra}]'"
        ) from error
