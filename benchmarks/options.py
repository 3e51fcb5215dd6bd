"""Options that benchmarks share: on which device, of which shape, how many seeds and processes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


def add_shape(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare ``--shape``.

    Args:
        parser: Of the benchmark.
        default: In words.
    """
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        metavar=("T", "B", "I", "H"),
        help=f"timesteps, sequences, input and hidden size; {default}",
    )


def add_run_options(parser: argparse.ArgumentParser, output: Path, contender: str) -> None:
    """Declare in how many processes runs are made, and where they and the results are kept.

    Args:
        parser: Of the benchmark.
        output: Folder for results, unless another is named.
        contender: Of whom there is one file of runs.
    """
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0 runs all in this one")
    parser.add_argument("--output", type=Path, default=output, help="folder for JSON and plot")
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder where results are kept run by run, and taken from if they are there; delete "
        f"the file of a {contender} that has changed",
    )


def check_device(options: argparse.Namespace) -> None:
    """End with one sentence where the device is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device here")


def check_shape(options: argparse.Namespace) -> None:
    """End with one sentence where a shape is too small to be measured."""
    if options.shape and min(options.shape) < 2:
        sys.exit(f"--shape: every size must be at least 2, got {options.shape}")


def check_run_options(options: argparse.Namespace) -> None:
    """End with one sentence where an option is not possible."""
    check_device(options)
    if options.seeds is not None and options.seeds < 1:
        sys.exit(f"--seeds must be at least 1, got {options.seeds}")
    if options.jobs < 0:
        sys.exit(f"--jobs must be at least 0, got {options.jobs}")


def seeds_of(options: argparse.Namespace, default: int) -> int:
    """How many seeds: as asked, one for a quick run, or ``default``."""
    return int(options.seeds or (1 if options.quick else default))
