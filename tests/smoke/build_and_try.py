"""Builds the wheel, installs it in an empty environment outside the checkout, and tries it there.

What only the checkout has (a forgotten module, a test dependency, an optional package) cannot help
the wheel here. `make wheel` runs this.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CONSTRAINTS = CHECKOUT / "constraints.txt"
SMOKE = Path(__file__).with_name("wheel_smoke.py")


def run(*command: str | Path, cwd: Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gradguard-wheel-") as name:
        scratch = Path(name)
        pip_options = ("--quiet", "--constraint", CONSTRAINTS)
        run(
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", scratch, CHECKOUT),
            *("--quiet", "--build-constraint", CONSTRAINTS),
            cwd=scratch,
        )
        (wheel,) = scratch.glob("*.whl")
        venv.create(scratch / "venv", with_pip=True)
        python = scratch / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", *pip_options, wheel, cwd=scratch)
        empty = scratch / "empty"
        empty.mkdir()
        # -I: neither the script's folder nor PYTHONPATH can lead back to the checkout.
        run(python, "-I", shutil.copy(SMOKE, empty), cwd=empty)
        print(f"{wheel.name}: works outside the checkout", flush=True)


if __name__ == "__main__":
    main()
