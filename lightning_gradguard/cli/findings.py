"""``gradguard findings``: what was found in a run, for people or as JSON."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lightning_gradguard.cli.command import Command
from lightning_gradguard.cli.run_directory import add_run_directory, read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_gradguard.diagnose import Severity
    from lightning_gradguard.record import Report
    from lightning_gradguard.record.run_history import RunHistory

_SEVERITIES = ("info", "warning", "critical")


def report_of(run: RunHistory, severity: Severity) -> Report:
    """The report as at the end of training, without findings that are less severe."""
    from lightning_gradguard.record import OptimizerReport, Report

    return Report(
        tuple(
            OptimizerReport(
                tuple(f for f in part.findings if f.severity >= severity),
                part.actions,
                part.counts,
                part.label,
                part.latest_times,
            )
            for part in run.optimizers
        )
    )


def every_finding(report: Report) -> Iterator[str]:
    """One line for each finding, in order of their steps."""
    from lightning_gradguard.record.finding_groups import name_of, since_when

    several = len(report.optimizers) > 1
    told = [
        (finding, f"[{part.label}] " if several else "")
        for part in report.optimizers
        for finding in part.findings
    ]
    for finding, label in sorted(told, key=lambda pair: pair[0].step):
        head = f"{finding.severity.label}: {label}{name_of(finding)}, {since_when(finding)}"
        yield f"step {finding.step}: {head}: {finding.message}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_directory(parser)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--json", action="store_true", help="print one JSON object, with numbers and remedies"
    )
    shape.add_argument(
        "--all",
        action="store_true",
        help="print a line for every finding by step, instead of the most important by cause",
    )
    parser.add_argument(
        "--severity",
        choices=_SEVERITIES,
        default=_SEVERITIES[0],
        help="leave out what is less severe (default: %(default)s)",
    )


def _run(options: argparse.Namespace) -> None:
    run = read(options.directory)

    from lightning_gradguard.diagnose import Severity

    severity = Severity.from_label(options.severity)
    report = report_of(run, severity)
    if options.json:
        print(report.to_json())  # noqa: T201 - this is its output
        return
    if options.all:
        for line in every_finding(report):
            print(line)  # noqa: T201 - this is its output
    elif sys.stdout.isatty():
        report.print()
    else:
        print(report)  # noqa: T201 - this is its output
    left_out = len(run.findings) - len(report.findings)
    if left_out:
        what = "1 finding is" if left_out == 1 else f"{left_out} findings are"
        print(f"{what} less severe than {options.severity} and left out.")  # noqa: T201


FINDINGS = Command(
    name="findings",
    help="print what was found in a run, with remedies",
    description="Print what was found in a run, with its evidence and remedies, and what the guard "
    "did: the report of the end of training, at any time. The exit status does not depend on what "
    "was found: take --json to decide by it.",
    example="gradguard findings lightning_logs/version_3 --severity warning",
    add_arguments=_add_arguments,
    run=_run,
)
