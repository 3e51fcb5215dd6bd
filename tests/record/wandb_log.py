"""What W&B has written of an offline run, read back from its own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_BLOCK, _HEADER = 32768, 7


@contextmanager
def offline(root: Path) -> Iterator[Any]:
    """The module ``wandb``, which writes below ``root`` and asks no server."""
    wandb = pytest.importorskip("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")  # Lightning's logger sets it, and leaves it so
        patch.setenv("WANDB_DIR", str(root))
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(root / name.lower()))
        try:
            yield wandb
        finally:
            wandb.finish()
            wandb.teardown()


def finished(wandb: Any, root: Path) -> Path:
    """The file of the only run below ``root``."""
    wandb.finish()
    wandb.teardown()  # the file is complete only once the service that writes it has ended
    (path,) = root.glob("wandb/offline-run-*/*.wandb")
    return path


def records_in(path: Path) -> Iterator[Any]:
    """The records in a file of W&B's, which is one of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind in (1, 4):  # all of a record, or its last part
            yield Record.FromString(part)
            part = b""


@dataclass
class WandbLog:
    """The records of a run by their kind.

    Attributes:
        files: Where its media are.
        history: Rows, each with what was logged at once.
        metrics: Definitions by name or pattern.
        config: As it was in the end.
        summary: As it was in the end.
        artifacts: As they were logged.
        alerts: Title, text and level of each.
    """

    files: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)

    def column(self, key: str, step: str = "trainer/global_step") -> list[tuple[Any, Any]]:
        """Steps and values of a key, in the order in which they were logged."""
        return [(row[step], row[key]) for row in self.history if key in row]

    def file(self, name: str) -> Path:
        """A media file, by its path in the run."""
        return self.files / name


def read_log(path: Path) -> WandbLog:
    """Reads the file of a run that has finished."""
    log = WandbLog(path.parent / "files")
    for record in records_in(path):
        kind = record.WhichOneof("record_type")
        value = getattr(record, kind)
        if kind == "history":
            log.history.append(_merged({}, value.item))
        elif kind == "metric":
            log.metrics[value.name or value.glob_name] = value
        elif kind in ("config", "summary"):
            _merged(getattr(log, kind), value.update)
        elif kind == "artifact":
            log.artifacts.append(value)
        elif kind == "alert":
            log.alerts.append((value.title, value.text, value.level))
    return log


def _merged(values: dict[str, Any], items: Any) -> dict[str, Any]:
    for item in items:
        *above, last = item.nested_key or [item.key]
        inner = values
        for key in above:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        inner[last] = json.loads(item.value_json)
    return values
