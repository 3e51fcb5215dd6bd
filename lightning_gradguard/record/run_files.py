"""Where the history of a run lies, and what a run is, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from lightning_gradguard.record.plain_values import plain_values
from lightning_gradguard.record.run_history import RunInfo
from lightning_gradguard.record.whole_files import replace_whole

GRADGUARD = "gradguard"
HISTORY = "history"
EVENTS = "events.jsonl"
REPORT = "report.html"
INFO = "run.json"
STEPS, LAYERS, UPDATES, TIMESTEPS = "steps.csv", "layers.csv", "updates.csv", "timesteps.csv"

# Of ``run.json`` and the tables beside it.
SCHEMA = 1

_TEXTS = ("name", "model", "status", "error", "started", "updated", "process")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(_TEXTS, str),
    "parameters": int,
    "planned_steps": (int, type(None)),
    **dict.fromkeys(("settings", "versions"), Mapping),
    "optimizers": (list, tuple),
}
# Of an optimizer; a rate that is NaN is a string.
_PART_KINDS: dict[str, Any] = {
    **dict.fromkeys(("label", "class", "mode"), str),
    "lr": (int, float, str),
    "counts": Mapping,
}


def folder_of(label: str) -> str:
    """The folder of an optimizer's tables in that of the history.

    Example:
        >>> folder_of("optimizer1"), folder_of("a/b"), label_of(folder_of("../b"))
        ('optimizer1', 'a%2Fb', '../b')
    """
    return quote(label, safe="").replace(".", "%2E")


def label_of(folder: str) -> str:
    """The inverse of :func:`folder_of`."""
    return unquote(folder)


def run_info_to_dict(info: RunInfo) -> dict[str, Any]:
    """Plain values, ready for JSON; NaN and infinities are strings there."""
    values = {part.name: getattr(info, part.name) for part in fields(RunInfo)}
    plain: dict[str, Any] = plain_values({"schema": SCHEMA, **values})
    return plain


def run_info_from_dict(values: Mapping[str, Any]) -> RunInfo:
    """The inverse of :func:`run_info_to_dict`; what is missing has its default.

    Raises:
        TypeError: If a value is of a kind that it cannot be.

    Example:
        >>> info = RunInfo("version_3", optimizers=({"label": "", "lr": 0.1},))
        >>> run_info_from_dict(run_info_to_dict(info)) == info
        True
    """
    known = {part.name: values[part.name] for part in fields(RunInfo) if part.name in values}
    _check_kinds(known, _KINDS)
    parts = known.get("optimizers", ())
    for part in parts:
        _check_kinds({"optimizers": part}, {"optimizers": Mapping})
        _check_kinds(part, _PART_KINDS)
        counts = part.get("counts", {})
        _check_kinds(counts, dict.fromkeys(counts, int))
    return RunInfo(**{**known, "optimizers": tuple(parts)})


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in kinds and not isinstance(value, kinds[name]):
            raise TypeError(f"{value!r} is no value of {name}")


def write_info(path: Path, info: RunInfo) -> None:
    """Put ``run.json`` in the place of the one before.

    Raises:
        OSError: If it cannot be written.
    """
    text = json.dumps(run_info_to_dict(info), indent=1, allow_nan=False, ensure_ascii=False)
    replace_whole(path, (text + "\n").encode("utf-8", errors="replace"))
