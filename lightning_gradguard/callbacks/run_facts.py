"""What a run is, as far as the Trainer and the guard's settings tell."""

from __future__ import annotations

import inspect
import math
import platform
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

import lightning_gradguard
from lightning_gradguard.callbacks.surroundings import planned_steps
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record.run_history import RunInfo

# Attributes whose argument has the name of something else in the callback.
_ARGUMENT = {"keeps_history": "history", "writes_report": "report"}


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def run_info(
    callbacks: Sequence[object],
    trainer: Trainer,
    module: LightningModule,
    guarded: Sequence[tuple[GuardEngine, Optimizer]],
) -> RunInfo:
    """What the run is, at its start.

    Args:
        callbacks: The guards on the Trainer.
        trainer: The Trainer of the fit.
        module: The model.
        guarded: Each engine with its optimizer.
    """
    kind = type(module)
    return RunInfo(
        name=_name(trainer),
        model=f"{kind.__module__}.{kind.__qualname__}",
        parameters=sum(
            p.numel() for p in module.parameters() if not isinstance(p, UninitializedParameter)
        ),
        started=now(),
        updated=now(),
        planned_steps=planned_steps(trainer),
        settings={type(callback).__name__: settings_of(callback) for callback in callbacks},
        versions={
            "lightning_gradguard": lightning_gradguard.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
        optimizers=tuple(
            {
                "label": engine.recorder.label,
                "class": type(optimizer).__name__,
                "lr": _rate(optimizer),
                "mode": engine.mode,
                "counts": engine.counts,
            }
            for engine, optimizer in guarded
        ),
    )


def _rate(optimizer: Optimizer) -> float:
    """Of its first group; NaN where it has none, as what Lightning takes for no optimizer."""
    return float(next((group.get("lr", math.nan) for group in optimizer.param_groups), math.nan))


def settings_of(callback: object) -> dict[str, Any]:
    """The arguments that a callback was made with, as plain values.

    Example:
        >>> from lightning_gradguard import GradGuard, UpdateCap
        >>> settings_of(GradGuard(cap=UpdateCap(max_ratio=0.05)))["cap"]["max_ratio"]
        0.05
    """
    values = {_ARGUMENT.get(name, name): value for name, value in vars(callback).items()}
    names = ("settings", *inspect.signature(type(callback).__init__).parameters)
    return {name: _plain(values[name]) for name in names if name in values}


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        named = {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
        return {"class": type(value).__name__, **named}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)  # a function of the user's


def _name(trainer: Trainer) -> str:
    """What the first logger calls the run."""
    if not trainer.loggers:
        return ""
    first = trainer.loggers[0]
    try:
        name, version = first.name, first.version
    except Exception:  # noqa: BLE001 - what it says of its files has been told already
        return ""
    version = f"version_{version}" if isinstance(version, int) else version
    return "/".join(str(part) for part in (name, version) if part)
