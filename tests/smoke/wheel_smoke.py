"""Tries an installed lightning-gradguard where nothing but its core dependencies is installed.

Run by build_and_try.py in an environment of its own; not a pytest module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import pkgutil
import sysconfig
from pathlib import Path

OPTIONAL = ("wandb", "matplotlib", "plotly", "rich")
# Imported only where the option is installed.
NEED_AN_OPTION = tuple(
    f"lightning_gradguard.{name}"
    for name in (
        "cli.watch_sections",
        "cli.watch_view",
        "record._plot_axes",
        "record._plot_decay",
        "record._plot_events",
        "record.rich_report",
    )
)


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"wheel smoke test failed: {otherwise}")


def check_installation() -> None:
    import lightning_gradguard

    where = Path(lightning_gradguard.__file__).resolve()
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    check(where.is_relative_to(site_packages), f"{where} is not in {site_packages}")
    typed = importlib.resources.files("lightning_gradguard") / "py.typed"
    check(typed.is_file(), "py.typed is not in the wheel")
    version = importlib.metadata.version("lightning-gradguard")
    check(version == lightning_gradguard.__version__, f"metadata says version {version}")
    for name in OPTIONAL:
        check(importlib.util.find_spec(name) is None, f"{name} came in as a core dependency")


def check_imports() -> None:
    import lightning_gradguard

    for module in pkgutil.walk_packages(lightning_gradguard.__path__, "lightning_gradguard."):
        if module.name not in NEED_AN_OPTION:
            importlib.import_module(module.name)
    for name in lightning_gradguard.__all__:
        getattr(lightning_gradguard, name)


def check_training() -> None:
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    from lightning_gradguard import GradGuard
    from lightning_gradguard.cli import main

    guard = GradGuard()
    trainer = Trainer(
        max_steps=4,
        callbacks=[guard],
        accelerator="cpu",
        logger=False,
        default_root_dir="run",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel(), torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=2))
    check(len(guard.history) == 4, f"4 steps of training left {len(guard.history)} records")
    check("4 steps" in str(guard.report()), "the report does not count the steps")
    guard.report().print()  # as text, without the package that makes it a table
    report = Path("run/gradguard/report.html").read_text(encoding="utf-8")
    check("4 steps" in report, "the page of the run does not count the steps")
    check("plotly" in report, "the page does not say what its charts need")
    check(main(["findings", "run"]) == 0, "the run cannot be looked at from the command line")


if __name__ == "__main__":
    check_installation()
    check_imports()
    check_training()
