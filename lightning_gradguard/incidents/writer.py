"""Write down a step that went wrong, so that it can be looked at again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.incidents import files
from lightning_gradguard.incidents.describe import describe, versions
from lightning_gradguard.incidents.draft import Draft
from lightning_gradguard.incidents.moment import Moment
from lightning_gradguard.incidents.reader import incidents_in
from lightning_gradguard.incidents.settings import Incidents
from lightning_gradguard.incidents.structure import encode
from lightning_gradguard.incidents.weights import Taken, compacted, fingerprint, take
from lightning_gradguard.record.plain_values import plain_values

# Left free for the finding, the exception and each step of the history, which come at the end.
_RESERVE = 2**16
_ROW = 320


class IncidentWriter:
    """Writes incidents into a folder, within their bounds.

    Args:
        folder: Where they go; made with the first of them.
        settings: What is kept, and how much. Default: ``Incidents()``.
        rank: Number of this process in the run. Each has incidents of its own, and counts them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``rank`` is negative.

    Example:
        >>> import tempfile, torch
        >>> from lightning_gradguard.incidents import Moment, RandomState, read_incident
        >>> model = nn.Linear(2, 1)
        >>> moment = Moment(torch.ones(4, 2), 0, RandomState.now(torch.device("cpu")))
        >>> writer = IncidentWriter(Path(tempfile.mkdtemp()))
        >>> draft = writer.begin(7, model, moment)
        >>> incident = read_incident(draft.commit("diverging"))
        >>> incident.step, incident.batch().shape
        (7, torch.Size([4, 2]))
    """

    def __init__(self, folder: Path, settings: Incidents | None = None, *, rank: int = 0) -> None:
        settings = settings or Incidents()
        check_type("folder", folder, Path, "a Path")
        check_type("settings", settings, Incidents, "an Incidents or None")
        check_number("rank", rank, at_least=0, integer=True)
        self.folder = folder
        self.settings = settings
        self.rank = rank
        self._run = str(time.time_ns())
        self._drafts: dict[Path, Draft] = {}

    def begin(
        self,
        step: int,
        module: nn.Module,
        moment: Moment | None,
        *,
        weights_step: int | None = None,
        label: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> Draft:
        """Put the tensors on the disk, where nobody reads them before :meth:`Draft.commit`.

        Args:
            step: The step that went wrong.
            module: The model, with its weights as they are now.
            moment: The batch of the step; ``None`` if it is no longer known.
            weights_step: The step that the weights are those before. Default: ``step``.
            label: Name of the optimizer, if there are several.
            facts: What else is to be known of the run, as plain values.

        Raises:
            OSError: If it cannot be written.
            ValueError: If there is no room within the bounds.
        """
        taken = take(module)
        weights = dict(taken.tensors) if self.settings.weights else {}
        content = self._content(moment)
        room = self._make_room(content.size, files.bytes_of(weights))
        if content.size > room:
            content = _Content(why_not="its batch did not fit in max_bytes")
        included = bool(weights) and content.size + files.bytes_of(weights) <= room
        known = {"batch_idx": moment.batch_idx if moment else 0, **(facts or {})}
        manifest = {
            "schema": files.SCHEMA,
            "step": step,
            "optimizer": label,
            "rank": self.rank,
            "run": self._run,
            "versions": versions(),
            "module": describe(module),
            "facts": plain_values(known),
            **content.in_manifest(),
            "weights": {
                "step": step if weights_step is None else weights_step,
                "included": included,
                **({} if included else self._instead_of_weights(taken)),
            },
        }
        needed = content.size + len(json.dumps(manifest))
        needed += files.bytes_of(weights) if included else 0
        if needed > room:
            raise ValueError(_no_room(self.settings))
        draft = Draft(self.folder, self._name(step, label), manifest, self._release)
        draft.history_rows, draft.room = self.settings.history_rows, needed + self._reserve
        self._drafts[draft.path] = draft
        draft.write(content.tensors, compacted(weights) if included else None)
        return draft

    def _name(self, step: int, label: str) -> str:
        parts = [str(step), label, f"rank{self.rank}" if self.rank else ""]
        return "-".join(part for part in parts if part)

    def _release(self, path: Path) -> None:
        self._drafts.pop(path, None)

    @property
    def _reserve(self) -> int:
        return _RESERVE + _ROW * self.settings.history_rows

    def _content(self, moment: Moment | None) -> _Content:
        if moment is None:
            return _Content(why_not="its batch is no longer known")
        if not self.settings.batch:
            return _Content(why_not="its batch was not to be kept (batch=False)")
        batch, random = encode(moment.batch), encode(moment.random.to_dict(), "random")
        if batch.problems:
            more = f" (and {len(batch.problems) - 1} more)" if len(batch.problems) > 1 else ""
            why_not = f"{batch.problems[0]}, which cannot be kept without pickle{more}"
            return _Content(batch.structure, random.structure, random.tensors, why_not)
        tensors = {**random.tensors, **batch.tensors}
        return _Content(batch.structure, random.structure, tensors)

    def _instead_of_weights(self, taken: Taken) -> dict[str, Any]:
        why_not = taken.why_not or (
            "they did not fit in max_bytes"
            if self.settings.weights
            else "they were not to be kept (weights=False)"
        )
        return {"why_not": why_not, "fingerprint": fingerprint(taken.tensors)}

    def _make_room(self, content: int, weights: int) -> int:
        """Remove what has to make way; returns the bytes that there are.

        Args:
            content: Bytes of the batch. Room for it is made at the expense of all but the first.
            weights: Bytes of the weights. Room for them is made in the incidents of other runs.

        Raises:
            ValueError: If all room is taken by what stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_stale(self.folder, set(self._drafts))
        kept = [i for i in incidents_in(self.folder) if i.manifest["rank"] == self.rank]
        earlier = [incident for incident in kept if incident.manifest["run"] != self._run]
        own = [incident for incident in kept if incident.manifest["run"] == self._run]
        under_way = sum(draft.room for draft in self._drafts.values())

        def room() -> int:
            there = sum(incident.size for incident in (*earlier, *own))
            return self.settings.max_bytes - under_way - there - self._reserve

        def is_full() -> bool:
            count = len(earlier) + len(own) + len(self._drafts)
            return count >= self.settings.max_count

        while earlier and (is_full() or content + weights > room()):
            files.remove(earlier.pop(0).directory)
        while own and (is_full() or (content > room() and len(own) > 1)):
            files.remove(own.pop().directory)
        if is_full() or room() < 0:
            raise ValueError(_no_room(self.settings))
        return room()


def _no_room(settings: Incidents) -> str:
    bounds = f"max_count={settings.max_count}, max_bytes={settings.max_bytes}"
    return f"there is no room for it beside those that stay ({bounds})"


@dataclass(frozen=True)
class _Content:
    """Batch and random numbers as they go to the disk."""

    batch: Any = None
    random: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    why_not: str = ""

    @property
    def size(self) -> int:
        return files.bytes_of(self.tensors)

    def in_manifest(self) -> dict[str, Any]:
        return {
            "replayable": not self.why_not,
            "why_not": self.why_not,
            "batch": self.batch,
            "random": self.random,
        }
