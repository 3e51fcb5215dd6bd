"""An incident that is being written."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from lightning_gradguard._validation import check_choice
from lightning_gradguard.diagnose import Finding
from lightning_gradguard.incidents import files
from lightning_gradguard.incidents.describe import describe_exception
from lightning_gradguard.incidents.reader import HISTORY, TENSORS, WEIGHTS
from lightning_gradguard.record import StepRecord
from lightning_gradguard.record.plain_values import plain_values

REASONS = ("non_finite", "diverging", "exception")


class Draft:
    """Has its tensors on the disk; nobody reads it before :meth:`commit`.

    Args:
        folder: Where the incident goes.
        name: Its name there.
        manifest: All that is known of it so far.
        release: Called with the path of the draft when it is over.

    Attributes:
        path: The hidden folder.
        room: Bytes that it may take at most.
        history_rows: Steps of the history that it may take at most.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        manifest: dict[str, Any],
        release: Callable[[Path], Any],
    ) -> None:
        self.path = folder / files.hidden_name("writing", name)
        self.room = 0
        self.history_rows = 0
        self._name = name
        self._manifest = {**manifest, "files": {}}
        self._release = release

    @property
    def step(self) -> int:
        """The step that went wrong."""
        return int(self._manifest["step"])

    @property
    def why_not(self) -> str:
        """Why it cannot be replayed; empty if it can."""
        return str(self._manifest["why_not"])

    def write(self, tensors: dict[str, Tensor], weights: dict[str, Tensor] | None) -> None:
        """Write the tensors; ``weights`` are left out if there are none."""
        try:
            self.path.mkdir(parents=True)
            self._manifest["files"][TENSORS] = files.write_tensors(self.path / TENSORS, tensors)
            if weights is not None:
                self._manifest["files"][WEIGHTS] = files.write_tensors(self.path / WEIGHTS, weights)
        except BaseException:
            self.discard()
            raise

    def commit(
        self,
        reason: str,
        *,
        finding: Finding | None = None,
        exception: BaseException | None = None,
        history: Sequence[StepRecord] = (),
    ) -> Path:
        """Write the rest and give the incident its name; returns its directory.

        Args:
            reason: ``"non_finite"``, ``"diverging"`` or ``"exception"``.
            finding: What was found.
            exception: What was raised.
            history: The last steps, oldest first.

        Raises:
            OSError: If it cannot be written.
            ValueError: If the reason is another, or there is no room within the bounds.
        """
        check_choice("reason", reason, REASONS)
        try:
            rows = history[len(history) - min(len(history), self.history_rows) :]
            lines = [json.dumps(plain_values(asdict(row)), allow_nan=False) + "\n" for row in rows]
            text = "".join(lines).encode()
            self._manifest["files"][HISTORY] = files.write_file(
                self.path / HISTORY, lambda file: _write(file, text)
            )
            self._manifest |= {
                "reason": reason,
                "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "order": time.time_ns(),
                "finding": finding and plain_values(finding.to_dict()),
                "exception": describe_exception(exception),
            }
            data = files.sealed(self._manifest)
            size = files.size_of(len(data), self._manifest)
            if size > self.room:
                raise ValueError(f"it takes {size} bytes, and there is room for {self.room}")
            files.write_file(self.path / files.MANIFEST, lambda file: _write(file, data))
            return files.publish(self.path, self._name)
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave nothing of it, unless it has got its name."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._release(self.path)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
