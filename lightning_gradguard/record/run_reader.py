"""Reads the history of a run, finished or not."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gradguard.record.events import read_events
from lightning_gradguard.record.past_events import past_actions, past_findings
from lightning_gradguard.record.run_files import (
    EVENTS,
    GRADGUARD,
    HISTORY,
    INFO,
    LAYERS,
    SCHEMA,
    STEPS,
    TIMESTEPS,
    UPDATES,
    folder_of,
    label_of,
    run_info_from_dict,
)
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory, RunInfo
from lightning_gradguard.record.table_rows import read_matrix, read_steps, read_times

# Runs that the sentence for a folder of runs names.
_NAMED = 3


class RunError(ValueError):
    """A run that cannot be read; the message says why in one sentence."""


def read_run(directory: str | os.PathLike[str]) -> RunHistory:
    """Read the history of a run, as far as it has come.

    It takes in what a run that is still going on has flushed, and leaves out what a crash has left
    half written. A run that has not recorded a step yet has empty tables.

    Args:
        directory: The run's log directory, the folder ``gradguard`` in it, ``history`` in that, or
            a ``history-1`` beside it that was put aside.

    Returns:
        The run; its ``directory`` is the folder of the history.

    Raises:
        RunError: If there is no run, or one that this version cannot read.

    Example:
        >>> read_run("no/such/place")
        Traceback (most recent call last):
        ...
        lightning_gradguard.record.run_reader.RunError: no/such/place does not exist
    """
    given = Path(directory)
    folder = history_folder(given)
    try:
        info, events = read_info(folder), _events(folder)
        labels = [str(part.get("label", "")) for part in info.optimizers] or _labels(folder)
        parts = tuple(_part(folder, label, info, events) for label in labels)
    except OSError as error:
        raise RunError(f"{folder} cannot be read ({error.strerror or error})") from error
    return RunHistory(info, parts, folder)


# -- where it is ----------------------------------------------------------------------------------


def history_folder(given: Path) -> Path:
    """The folder of the history of the run in a directory, see :func:`read_run`.

    Raises:
        RunError: If there is no run, or it cannot be looked for.
    """
    try:
        if not given.exists():
            raise RunError(f"{given} does not exist")
        if not given.is_dir():
            raise RunError(f"{given} is a file, not the directory of a run")
        for folder in (given, given / HISTORY, given / GRADGUARD / HISTORY):
            if (folder / INFO).is_file():
                return folder
        runs = _runs_below(given)
    except OSError as error:
        raise RunError(f"{given} cannot be read ({error.strerror or error})") from error
    if runs:
        named = ", ".join(str(run) for run in runs[:_NAMED])
        more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
        raise RunError(f"{given} is not a run itself: choose one of those in it, {named}{more}")
    raise RunError(f"{given} has no run in it: there is no {GRADGUARD}/{HISTORY}/{INFO}")


def _runs_below(given: Path) -> list[Path]:
    """Log directories of the runs in a folder of runs, or of folders of runs, newest first."""
    inside = f"{GRADGUARD}/{HISTORY}/{INFO}"
    found = [*given.glob(f"*/{inside}"), *given.glob(f"*/*/{inside}")]
    dated = sorted((path.stat().st_mtime, path) for path in found)
    return [path.parents[2] for _, path in reversed(dated)]


# -- what is in it --------------------------------------------------------------------------------


def read_info(folder: Path) -> RunInfo:
    """What the run is whose history is in a folder.

    Raises:
        OSError: If it cannot be read.
        RunError: If this version cannot make sense of it.
    """
    path = folder / INFO
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(values, dict) or "schema" not in values:
        raise RunError(f"{path} is not of lightning-gradguard: it names no schema")
    if values["schema"] != SCHEMA:
        raise RunError(
            f"{path} is of schema {values['schema']!r}, and this version of lightning-gradguard "
            f"reads schema {SCHEMA}"
        )
    try:
        return run_info_from_dict(values)
    except TypeError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def events_path(folder: Path) -> Path:
    """The events of a run that goes on lie beside its history, those of one put aside in it."""
    path = folder / EVENTS
    return folder.parent / EVENTS if folder.name == HISTORY and not path.exists() else path


def _events(folder: Path) -> list[dict[str, Any]]:
    path = events_path(folder)
    return list(read_events(path)) if path.is_file() else []


def _labels(folder: Path) -> list[str]:
    found = sorted(path.parent for path in folder.glob(f"*/{STEPS}"))
    return [label_of(path.name) for path in found] or [""]


def _part(
    folder: Path, label: str, info: RunInfo, events: Sequence[Mapping[str, Any]]
) -> OptimizerHistory:
    tables = folder / folder_of(label)
    own = [event for event in events if event.get("optimizer", "") == label]
    facts: Mapping[str, Any] = next(
        (part for part in info.optimizers if part.get("label", "") == label), {}
    )
    return OptimizerHistory(
        label=label,
        steps=read_steps(tables / STEPS),
        layers=read_matrix(tables / LAYERS),
        updates=read_matrix(tables / UPDATES),
        times=read_times(tables / TIMESTEPS),
        findings=past_findings(own),
        actions=past_actions(own),
        counts={name: int(count) for name, count in facts.get("counts", {}).items()},
    )
