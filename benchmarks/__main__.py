"""``python -m benchmarks NAME``: one subcommand for each benchmark."""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Protocol, cast

# Before torch is imported: a thread pool that is sized later is sized too late.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces each of its runs

COMMANDS = {
    "detection": "how often findings and the alarms of others are right, on programs held out",
    "overhead": "what the guard and its peers cost per training step",
    "timesteps": "what gradients through time cost, beside training and beside unrolled cells",
    "modules": "what recurrent modules cost, beside fused ones of torch and beside those of others",
    "rescue": "over which learning rates and faults runs are saved, and whether any is harmed",
    "memory": "what recurrent modules learn to remember, and whether the horizon says so before",
    "remedies": "what remedies are worth, on programs that fail without them",
}


class Command(Protocol):
    """What the module ``benchmarks.NAME`` has to offer."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""

    def run(self, options: argparse.Namespace) -> int:
        """Measure, print and write under ``benchmarks/results``; returns the exit status."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, summary in COMMANDS.items():
        command = cast("Command", importlib.import_module(f"benchmarks.{name}"))
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
