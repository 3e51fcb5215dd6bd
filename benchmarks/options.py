"""Options that the long benchmarks share: how many seeds, how many processes, on which device."""

from __future__ import annotations

import argparse
import sys

import torch


def check_run_options(options: argparse.Namespace) -> None:
    """End with one sentence where an option is not possible."""
    if options.seeds is not None and options.seeds < 1:
        sys.exit(f"--seeds must be at least 1, got {options.seeds}")
    if options.jobs < 0:
        sys.exit(f"--jobs must be at least 0, got {options.jobs}")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this torch sees no CUDA device")


def seeds_of(options: argparse.Namespace, default: int) -> int:
    """How many seeds: as asked, one for a quick run, or ``default``."""
    return int(options.seeds or (1 if options.quick else default))
