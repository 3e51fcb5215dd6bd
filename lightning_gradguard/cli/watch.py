"""``gradguard watch``: follow a run from another terminal."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_gradguard.cli.command import Command, CommandError, extra_needed, in_one_line
from lightning_gradguard.cli.run_directory import add_run_directory, no_step

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_gradguard.cli.progress import Seen
    from lightning_gradguard.cli.run_follower import RunFollower

# Terminals that nothing can be drawn on.
_NO_SCREEN = ("dumb", "unknown")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_directory(parser)
    parser.add_argument(
        "--every",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="how often to look (default: %(default)g)",
    )
    parser.add_argument(
        "--once", action="store_true", help="print what there is to see now, and end"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.05 <= value <= 86400.0:
        raise argparse.ArgumentTypeError(f"must be between 0.05 and 86400 seconds, got {text}")
    return value


def _run(options: argparse.Namespace) -> None:
    from lightning_gradguard.cli.run_follower import RunFollower
    from lightning_gradguard.record.run_reader import RunError

    try:
        follower = RunFollower(options.directory)
        seen = follower.look()
        if seen.ended and not seen.steps:
            raise no_step(options.directory)
        if options.once:
            _show(seen, _console())
        elif sys.stdout.isatty() and os.environ.get("TERM") not in _NO_SCREEN:
            console = _console()
            if not seen.ended:
                seen = _show_live(follower, options.every, console)
            _show(seen, console)
        else:
            _print_lines(follower, options.every)
    except RunError as error:  # says in a sentence what is wrong
        raise CommandError(in_one_line(error)) from error
    except KeyboardInterrupt:
        return


def _console() -> Console:
    with extra_needed("report"):
        from rich.console import Console

    return Console(highlight=False)


def _print_lines(follower: RunFollower, every: float) -> None:
    """A line for each change, for a file or a pipe."""
    from lightning_gradguard.cli.watch_lines import NewLines

    lines = NewLines()
    while True:
        seen = follower.look()
        for line in lines.of(seen):
            print(line, flush=True)  # noqa: T201 - this is its output
        if seen.ended:
            return
        time.sleep(every)


def _show_live(follower: RunFollower, every: float, console: Console) -> Seen:
    """Fill the terminal until the run ends, and give it back as it was."""
    from rich.live import Live

    from lightning_gradguard.cli.watch_view import view

    with _leaving_when_told(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            seen = follower.look()
            screen = view(seen, width=console.width, height=console.height)
            live.update(screen, refresh=True)
            if seen.ended:
                return seen
            time.sleep(every)


@contextmanager
def _leaving_when_told() -> Iterator[None]:
    """Let SIGTERM end the program as an exception, so that the terminal is given back."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(seen: Seen, console: Console) -> None:
    from lightning_gradguard.cli.watch_view import view

    console.print(view(seen, width=console.width))


WATCH = Command(
    name="watch",
    help="follow a run from another terminal",
    description="Follow a run from another terminal: loss and gradient norm of the last steps, "
    "what the guard is doing, open findings, the way of the gradient through time. Ends with the "
    "run, or by Ctrl-C. Where the output is no terminal, prints a line for each change.",
    example="gradguard watch lightning_logs/version_3",
    add_arguments=_add_arguments,
    run=_run,
)
