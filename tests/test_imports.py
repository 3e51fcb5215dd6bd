"""The torch-only rooms stay torch-only, and optional packages stay optional.

The import-linter contract reads the source; these tests ask a fresh interpreter what it loaded, so
that an import made by string or by a dependency counts too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gradguard

HEAVY = frozenset({"lightning", "pytorch_lightning", "wandb", "matplotlib", "plotly"})

PRINT_LOADED = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"

# The first finder to be asked, and it says no: as if the package were not installed.
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil
import lightning_gradguard as package

found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
modules = [module.name for module in found]
for module in modules:
    importlib.import_module(module)
for name in package.__all__:
    getattr(package, name)
print("imported", len(modules))
"""


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    checkout = Path(lightning_gradguard.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def packages_loaded_by(statement: str, cwd: Path) -> set[str]:
    """Top-level packages in a fresh interpreter after it ran `statement`."""
    done = run_python(f"{statement}\n{PRINT_LOADED}", cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("room", ["measure", "diagnose", "respond", "guard"])
def test_importing_a_torch_only_room_loads_nothing_heavy(room, tmp_path):
    loaded = packages_loaded_by(f"import lightning_gradguard.{room}", tmp_path)

    assert "lightning_gradguard" in loaded
    assert loaded & HEAVY == set()


def test_the_check_above_reports_lightning_where_it_is_loaded(tmp_path):
    loaded = packages_loaded_by("import lightning_gradguard.callbacks", tmp_path)

    assert "lightning" in loaded & HEAVY


@pytest.mark.parametrize("package", sorted(HEAVY - {"plotly"}))
def test_the_check_above_can_see_every_package_it_looks_for(package, tmp_path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")

    assert package in packages_loaded_by(f"import {package}", tmp_path)


def test_importing_the_package_loads_neither_torch_nor_anything_heavy(tmp_path):
    loaded = packages_loaded_by("import lightning_gradguard", tmp_path)

    assert loaded & (HEAVY | {"torch", "torchmetrics", "numpy"}) == set()


def test_diagnose_needs_no_torch(tmp_path):
    loaded = packages_loaded_by("import lightning_gradguard.diagnose", tmp_path)

    assert "torch" not in loaded


def test_everything_imports_where_wandb_and_plotly_are_missing(tmp_path):
    block = BLOCK.format(names={"wandb", "plotly"})

    done = run_python(block + IMPORT_EVERYTHING, tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")


def test_the_blocker_above_does_block(tmp_path):
    done = run_python(BLOCK.format(names={"wandb", "plotly"}) + "import wandb", tmp_path)

    assert done.returncode != 0
    assert "No module named 'wandb'" in done.stderr
