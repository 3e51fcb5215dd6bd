"""Incidents as they lie on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.incidents.errors import IncidentError
from lightning_gradguard.incidents.files import MANIFEST, SCHEMA, size_of, unsealed
from lightning_gradguard.incidents.randomness import RandomState
from lightning_gradguard.incidents.rebuild import decode

TENSORS, WEIGHTS, HISTORY = "tensors.pt", "weights.pt", "history.jsonl"


@dataclass(frozen=True)
class Incident:
    """One incident that is whole.

    Attributes:
        directory: Where it lies.
        manifest: All that is not a tensor, as in ``incident.json``.
        size: Bytes of all of its files.
    """

    directory: Path
    manifest: Mapping[str, Any] = field(repr=False)
    size: int = 0

    @property
    def step(self) -> int:
        """Optimizer step."""
        return int(self.manifest["step"])

    @property
    def reason(self) -> str:
        """``"non_finite"``, ``"diverging"`` or ``"exception"``."""
        return str(self.manifest["reason"])

    @property
    def has_weights(self) -> bool:
        """Whether the weights are in it, and not only their fingerprint."""
        return WEIGHTS in self.manifest["files"]

    def history(self) -> list[dict[str, Any]]:
        """The last steps before it, oldest first; what is not finite is a string."""
        text = (self.directory / HISTORY).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def batch(
        self,
        place: Callable[[Tensor, str], Tensor] | None = None,
        main: ModuleType | None = None,
    ) -> Any:
        """The batch as it was.

        Args:
            place: Moves a tensor, told the type of the device it was on. Default: to the CPU.
            main: Module in which classes of the script that ran are found.

        Raises:
            IncidentError: If it was not kept, or cannot be put together.
        """
        if not self.manifest["replayable"]:
            raise IncidentError(
                f"{self.directory} cannot be replayed, because {self.manifest['why_not']}"
            )
        return decode(self.manifest["batch"], self._tensors(TENSORS), place=place, main=main)

    def random_state(self) -> RandomState:
        """The random numbers before the forward pass of the batch."""
        return RandomState.from_dict(decode(self.manifest["random"], self._tensors(TENSORS)))

    def weights(self) -> dict[str, Tensor]:
        """The weights, if it has them."""
        return self._tensors(WEIGHTS)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.directory / name
        found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return found

    def __str__(self) -> str:
        versions = self.manifest["versions"]
        told = [f"{name} {versions[name]}" for name in ("torch", "lightning") if name in versions]
        weights = "weights included" if self.has_weights else "without weights"
        details = ", ".join([f"written {self.manifest['written']}", *told, weights])
        return f"Incident at step {self.step} ({self.reason}), {details}."


def read_incident(directory: str | Path) -> Incident:
    """Read an incident, after checking that every byte of it is as it was written.

    Args:
        directory: Its directory, ``".../gradguard/incidents/412"``.

    Raises:
        IncidentError: If it is none, or not whole.

    Example:
        >>> read_incident("no/such/place")
        Traceback (most recent call last):
        ...
        lightning_gradguard.incidents.errors.IncidentError: no/such/place is not an incident: it ...
    """
    folder = Path(directory)
    incident = look_at(folder)
    for name, known in incident.manifest["files"].items():
        try:
            with (folder / name).open("rb") as file:
                found = _sum_of(file)
        except OSError as error:
            raise IncidentError(
                f"{folder} is not whole: its {name} cannot be read ({error.strerror})"
            ) from error
        if found != known["sha256"]:
            raise IncidentError(f"{folder} is not whole: its {name} is not what was written")
    return incident


def _sum_of(file: Any) -> str:
    total = hashlib.sha256()
    while chunk := file.read(2**20):
        total.update(chunk)
    return total.hexdigest()


def look_at(folder: Path) -> Incident:
    """Read the manifest of an incident only.

    Raises:
        IncidentError: If there is none, or it is not as it was written.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise IncidentError(
            f"{folder} is not an incident: it has no {MANIFEST} that can be read"
        ) from error
    manifest = unsealed(data)
    if manifest is None:
        raise IncidentError(f"{folder} is not whole: its {MANIFEST} is not what was written")
    if manifest.get("schema") != SCHEMA:
        raise IncidentError(
            f"{folder} is of schema {manifest.get('schema')!r}, and this version of "
            f"lightning-gradguard reads schema {SCHEMA}"
        )
    return Incident(folder, manifest, size_of(len(data), manifest))


def list_incidents(folder: str | Path) -> list[Path]:
    """Directories of the incidents in a folder, in the order in which they were written.

    Args:
        folder: ``".../gradguard/incidents"``; one that is not there has none.

    Example:
        >>> list_incidents("no/such/place")
        []
    """
    return [incident.directory for incident in incidents_in(Path(folder))]


def incidents_in(folder: Path) -> list[Incident]:
    """All of them, with their manifests only."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            continue
        try:
            found.append(look_at(path))
        except IncidentError:
            continue  # something else, or damaged: reading it by name says what is wrong
    return sorted(found, key=lambda incident: int(incident.manifest["order"]))
