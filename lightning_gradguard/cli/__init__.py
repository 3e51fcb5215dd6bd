"""``gradguard ...``: what can be done from a terminal.

No command imports anything heavy before it is run: ``gradguard --help`` loads neither torch nor
numpy.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import lightning_gradguard
from lightning_gradguard.cli.command import CommandError
from lightning_gradguard.cli.dashboard import DASHBOARD
from lightning_gradguard.cli.findings import FINDINGS
from lightning_gradguard.cli.replay import REPLAY
from lightning_gradguard.cli.report import REPORT
from lightning_gradguard.cli.watch import WATCH

__all__ = ["CommandError", "main"]

COMMANDS = (WATCH, FINDINGS, REPORT, DASHBOARD, REPLAY)

# As argparse does for arguments that it cannot read.
_BAD_ARGUMENTS = 2
# As a shell tells of a program that was ended by SIGINT, and by SIGPIPE.
_INTERRUPTED, _READER_GONE = 128 + 2, 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 if it ran, 2 if it could not.

    Args:
        arguments: Those of the command line. Default: the program's own.

    Example:
        >>> main(["findings", "no/such/place"])
        2
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    try:
        options.run(options)
        sys.stdout.flush()
    except CommandError as error:
        print(f"gradguard: error: {error}", file=sys.stderr)  # noqa: T201 - this is its output
        return _BAD_ARGUMENTS
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # `gradguard findings ... | head`
        # What is still buffered would raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradguard",
        description="Look at a training run that was watched by lightning-gradguard: while it "
        "runs, afterwards, and again at what went wrong.",
        epilog="gradguard COMMAND --help tells more. Exit status: 0 if the command ran, whatever "
        "it found; 2 if it could not, with the reason on the standard error.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {lightning_gradguard.__version__}"
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.help,
            description=command.description,
            epilog=f"example: {command.example}",
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
