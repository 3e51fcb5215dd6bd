"""Commands as a user runs them, each in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Set
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
# Of a user's terminal, not of the one that the tests run in.
_ENVIRONMENT = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def environment_of(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a user's terminal."""
    return {**os.environ, **_ENVIRONMENT, **(more or {})}


def command_of(*arguments: str) -> list[str]:
    """``gradguard`` with arguments."""
    return [sys.executable, "-W", "ignore", "-m", "lightning_gradguard.cli", *arguments]


def run(
    folder: Path, *command: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder."""
    return _done(folder, [sys.executable, "-W", "ignore", *command], environment)


def gradguard(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``gradguard`` in a folder."""
    return _done(folder, command_of(*arguments), environment)


def _done(
    folder: Path, command: list[str], environment: Mapping[str, str] | None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment_of(environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from lightning_gradguard.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without(packages: Set[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``gradguard`` where some packages are not installed."""
    return run(folder, "-c", _WITHOUT.format(names=set(packages)), *arguments)
