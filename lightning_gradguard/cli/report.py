"""``gradguard report``: a run as one HTML file."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from lightning_gradguard.cli.command import Command, CommandError, extra_needed
from lightning_gradguard.cli.run_directory import add_run_directory, read


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_directory(parser)
    parser.add_argument("--open", action="store_true", help="show it in the web browser")
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        help="the file to write; default: report.html beside what was recorded",
    )
    parser.add_argument(
        "--compare",
        metavar="RUN_B",
        type=Path,
        help="directory of a second run: the report says what changed since",
    )


def _run(options: argparse.Namespace) -> None:
    if options.output is not None and options.output.is_dir():
        raise CommandError(f"--output must be a file, got the directory {options.output}")
    run = read(options.directory)
    other = None if options.compare is None else read(options.compare)
    path = options.output or _beside(run.directory or options.directory)
    with extra_needed("report"):
        from lightning_gradguard.record.html_report import write_report

        try:
            write_report(run, path, other)
        except OSError as error:
            raise CommandError(f"{path} cannot be written ({error.strerror or error})") from error
    print(path)  # noqa: T201 - this is its output
    if options.open and not webbrowser.open(path.resolve().as_uri()):
        raise CommandError(f"no web browser can be opened here; the report is {path}")


def _beside(history: Path) -> Path:
    """As at the end of a fit; that of an earlier run, put aside, stays with its history."""
    from lightning_gradguard.record.run_files import HISTORY

    folder = history.parent if history.name == HISTORY else history
    return folder / "report.html"


REPORT = Command(
    name="report",
    help="write a run as one HTML file that needs no network",
    description="Write a run as one self-contained HTML file: the verdict, the findings with their "
    "evidence and remedies, the course of loss and gradient norm with what the guard did, the "
    "layers, and the way of the gradient through time. Prints the path of the file.",
    example="gradguard report logs/version_3 --compare logs/version_2 --open",
    add_arguments=_add_arguments,
    run=_run,
)
