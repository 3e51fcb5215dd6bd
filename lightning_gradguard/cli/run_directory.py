"""The argument that most commands have: the directory of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gradguard.cli.command import CommandError, in_one_line

if TYPE_CHECKING:
    from lightning_gradguard.record.run_history import RunHistory


def add_run_directory(parser: argparse.ArgumentParser) -> None:
    """The positional argument ``RUN_DIR``."""
    parser.add_argument(
        "directory",
        metavar="RUN_DIR",
        type=Path,
        help="where the run logs to, such as lightning_logs/version_3, or the folder gradguard in "
        "it",
    )


def read(directory: Path) -> RunHistory:
    """The run in a directory.

    Raises:
        CommandError: If there is none that can be read, or nothing in it.
    """
    from lightning_gradguard.record.run_reader import RunError, read_run

    try:
        run = read_run(directory)
    except RunError as error:  # says in a sentence what is wrong
        raise CommandError(in_one_line(error)) from error
    if not any(len(part.steps["step"]) or part.findings for part in run.optimizers):
        raise no_step(directory)
    return run


def no_step(directory: Path) -> CommandError:
    """A run that is there, but of which there is nothing to tell."""
    return CommandError(f"the run in {directory} has recorded no step")
