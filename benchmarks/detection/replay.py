"""What our detectors find in recorded observations, without training again."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.detection.records import RunResult
from lightning_gradguard.diagnose import (
    Diagnosis,
    Finding,
    Observation,
    Severity,
    Thresholds,
    default_detectors,
    layer_detectors,
    time_detectors,
)


@dataclass
class Warned:
    """A finding in its last state, and when it first was a warning.

    Attributes:
        finding: The finding.
        step: The step after which it was known that it is a warning; ``None`` if it never was.
    """

    finding: Finding
    step: int | None


def replay(
    observations: Iterable[Observation], thresholds: Thresholds | None = None
) -> list[Warned]:
    """Runs our detectors over a run, in the order and with the links that a guard gives them.

    Args:
        observations: All of one run.
        thresholds: The numbers they use; their defaults if not given.
    """
    diagnosis = Diagnosis(
        default_detectors(thresholds), [*layer_detectors(thresholds), *time_detectors(thresholds)]
    )
    return follow(diagnosis, observations)


def follow(diagnosis: Diagnosis, observations: Iterable[Observation]) -> list[Warned]:
    """Returns what a diagnosis finds, in the order in which it was found.

    Args:
        diagnosis: A new one.
        observations: All of one run.
    """
    found: list[Warned] = []
    open_now: dict[tuple[str, str, bool], Warned] = {}
    for observation in observations:
        for finding in diagnosis.observe(observation):
            key = finding.pathology.value, finding.where, finding.local
            warned = open_now.get(key)
            if warned is None:
                warned = open_now[key] = Warned(finding, None)
                found.append(warned)
            warned.finding = finding
            if warned.step is None and finding.severity >= Severity.WARNING:
                warned.step = observation.step
            if finding.until is not None:
                del open_now[key]
    return found


class Cache:
    """Runs in a folder, one file for each program and seed.

    Args:
        folder: Where; made when the first run is kept. Only folders of your own, as they hold
            pickles.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, program: str, seed: int) -> Path:
        """Where a run is kept."""
        return self.folder / f"{program.replace('/', '_')}__{seed}.pickle"

    def keep(self, result: RunResult) -> None:
        """Writes a run; a half-written file never takes the place of a whole one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(result.program, result.seed)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            pickle.dump(result, file, protocol=pickle.HIGHEST_PROTOCOL)
        partial.replace(path)

    def load(self, program: str, seed: int) -> RunResult | None:
        """The run, or ``None`` if it is not there."""
        path = self.path(program, seed)
        return read_run(path) if path.exists() else None


def read_run(path: Path) -> RunResult:
    """Reads one kept run."""
    with path.open("rb") as file:
        result: RunResult = pickle.load(file)
    return result
