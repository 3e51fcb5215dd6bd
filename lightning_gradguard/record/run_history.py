"""A whole run as plain arrays and values: what plots, reports and views are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.respond.actions import Action

Floats = npt.NDArray[np.float64]

RunStatus = Literal["running", "finished", "failed", "stopped"]

STEP_COLUMNS = tuple(column.name for column in fields(StepRecord))


def _no_steps() -> dict[str, Floats]:
    return {name: np.empty(0) for name in STEP_COLUMNS}


@dataclass(frozen=True)
class LayerMatrix:
    """One number per layer, at some of the steps.

    Attributes:
        names: Layers, L of them, in the order of the model.
        steps: Optimizer steps, shape ``(S,)``, ascending.
        values: Shape ``(S, L)``; NaN where a layer had no value.
    """

    names: tuple[str, ...] = ()
    steps: Floats = field(default_factory=lambda: np.empty(0))
    values: Floats = field(default_factory=lambda: np.empty((0, 0)))


@dataclass(frozen=True)
class OptimizerHistory:
    """What happened to the parameters of one optimizer.

    Attributes:
        label: Name of the optimizer where there are several; empty if it is the only one.
        steps: The columns of :class:`StepRecord`, each of shape ``(S,)``, by ascending step; NaN
            where a value was not known. Of a long run, the older steps are thinned.
        layers: Gradient norm of each layer.
        updates: Relative update of each layer, from the steps at which all layers were inspected.
        times: Readings through time, oldest first.
        findings: As they stand now, in the order in which they opened.
        actions: In the order in which they were taken.
        counts: Running counts by name: steps; skipped, clipped and capped ones; findings;
            rollbacks.
    """

    label: str = ""
    steps: Mapping[str, Floats] = field(default_factory=_no_steps)
    layers: LayerMatrix = LayerMatrix()
    updates: LayerMatrix = LayerMatrix()
    times: tuple[TimeReading, ...] = ()
    findings: tuple[Finding, ...] = ()
    actions: tuple[Action, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def latest_times(self) -> tuple[TimeReading, ...]:
        """The newest reading of each module, layer and direction.

        A module that was measured exactly by layer and direction has no other reading here.
        """
        latest = {reading.name: reading for reading in self.times}
        parts = {reading.module for reading in latest.values() if reading.part}
        return tuple(r for r in latest.values() if r.part or r.module not in parts)


@dataclass(frozen=True)
class RunInfo:
    """What a run is, beside its numbers.

    Attributes:
        name: What the run is called, ``"lightning_logs/version_3"``.
        model: Class of the model, ``"package.module.Class"``.
        parameters: How many numbers the model has.
        status: ``"running"``, ``"finished"``, ``"failed"`` (by an exception) or ``"stopped"`` (by
            the guard, or by hand).
        error: The exception of a run that failed, in one line.
        started: When training began, ISO 8601 in UTC.
        updated: When it was heard of last.
        process: Which process writes its history, as ``host:number``.
        planned_steps: Optimizer steps that it is planned to take; ``None`` if not known.
        settings: The guard's, as plain values.
        versions: Of this package, torch, lightning and Python, by name.
        optimizers: Of each its ``label``, ``class``, ``lr`` and ``counts``; and its ``mode``,
            ``"protect"`` or ``"observe"``: whether the guard responds.
    """

    name: str = ""
    model: str = ""
    parameters: int = 0
    status: RunStatus = "running"
    error: str = ""
    started: str = ""
    updated: str = ""
    process: str = ""
    planned_steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    optimizers: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class RunHistory:
    """A run, as it was kept on disk or is in memory.

    Attributes:
        info: What it is.
        optimizers: One part for each optimizer.
        directory: Where it was read from; ``None`` if it was not.
    """

    info: RunInfo = RunInfo()
    optimizers: tuple[OptimizerHistory, ...] = ()
    directory: Path | None = None

    @property
    def findings(self) -> list[Finding]:
        """All findings, in order of their steps."""
        found = [finding for part in self.optimizers for finding in part.findings]
        return sorted(found, key=lambda finding: finding.step)
