"""Folders that are there as a whole or not at all.

A folder is written under a hidden name, made safe on the disk, and gets its name in one step. To
remove one, it gets a hidden name first. Hidden folders of processes that are no more are removed by
whoever writes next.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

MANIFEST = "incident.json"
SCHEMA = 1

_HIDDEN = re.compile(r"\.(?:writing|removing)-.+-(?P<pid>\d+)@(?P<host>[^@]*)")
# Of the archive that torch writes, for each tensor and as a whole: headers, alignment, the index.
_PER_TENSOR = 1024
_PER_ARCHIVE = 4096


def hidden_name(purpose: str, name: str) -> str:
    """A name that no reader looks at, which says whose it is."""
    return f".{purpose}-{name}-{os.getpid()}@{_host()}"


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> dict[str, Any]:
    """Write a new file onto the disk; returns its size and SHA-256."""
    with path.open("xb") as file:
        summed = _Summed(file)
        write(cast("BinaryIO", summed))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": summed.size, "sha256": summed.sum.hexdigest()}


class _Summed:
    """A file that is written from its beginning to its end, and summed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sum = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self.sum.update(data)
        written = self._file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write tensors such that ``torch.load(..., weights_only=True)`` reads them."""
    return write_file(path, lambda file: torch.save(tensors, file))


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """At least as many as :func:`write_tensors` will write."""
    return _PER_ARCHIVE + sum(
        _PER_TENSOR + 4 * len(name) + _values(tensor) for name, tensor in tensors.items()
    )


def _values(tensor: Tensor) -> int:
    if tensor.layout is torch.strided:
        return tensor.numel() * tensor.element_size()
    if tensor.layout is torch.sparse_coo:
        nonzero, indices = tensor._nnz(), tensor.sparse_dim()  # noqa: SLF001 - no public name
        dense = tensor.shape[indices:].numel()
        return _PER_TENSOR + nonzero * (8 * indices + dense * tensor.element_size())
    parts = (
        (tensor.crow_indices(), tensor.col_indices())
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        else (tensor.ccol_indices(), tensor.row_indices())
    )
    return 2 * _PER_TENSOR + sum(_values(part) for part in (*parts, tensor.values()))


def sync_folder(path: Path) -> None:
    """Make names in a folder safe, where folders can be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(hidden: Path, name: str) -> Path:
    """Give a finished folder its name, or the next one that is free; returns its path."""
    sync_folder(hidden)
    target = hidden.with_name(name)
    number = 1
    while True:
        try:
            if target.exists():  # Windows has another error for each case
                raise FileExistsError(target)
            hidden.replace(target)
            break
        except OSError:
            if not target.exists():
                raise
            number += 1
            target = hidden.with_name(f"{name}-{number}")
    sync_folder(hidden.parent)
    return target


def remove(folder: Path) -> None:
    """Remove a folder at once for readers; one that is gone already is all right."""
    hidden = folder.with_name(hidden_name("removing", folder.name))
    try:
        folder.replace(hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def remove_stale(parent: Path, ours: Collection[Path]) -> None:
    """Remove what processes of this machine have left that are no more.

    Args:
        parent: Folder of the incidents.
        ours: Hidden folders that this process is writing.
    """
    for folder in parent.iterdir():
        owner = _HIDDEN.fullmatch(folder.name)
        if owner is None or owner["host"] != _host() or folder in ours:
            continue
        if int(owner["pid"]) == os.getpid() or not _is_alive(int(owner["pid"])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # a signal would end it there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# -- the manifest ---------------------------------------------------------------------------------


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as JSON, with its own sum."""
    return json.dumps({**manifest, "sum": _sum(manifest)}, allow_nan=False, indent=1).encode()


def unsealed(data: bytes) -> dict[str, Any] | None:
    """The manifest; ``None`` if it is none, or not as it was written."""
    try:
        manifest = json.loads(data)
    except ValueError:
        return None
    if not isinstance(manifest, dict):
        return None
    return manifest if manifest.pop("sum", None) == _sum(manifest) else None


def _sum(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def size_of(manifest_bytes: int, manifest: dict[str, Any]) -> int:
    """Bytes of all files of an incident."""
    return manifest_bytes + sum(int(file["bytes"]) for file in manifest["files"].values())
