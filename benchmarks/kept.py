"""Where a benchmark keeps its runs, so that one of hours can be interrupted and goes on."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from benchmarks.workers import Crash, in_processes


class _Job(Protocol):
    """A frozen dataclass with a key."""

    @property
    def key(self) -> str:
        """Tells it from all others."""


Job = TypeVar("Job", bound=_Job)
Result = TypeVar("Result")


@contextmanager
def folder_for(cache: Path | None) -> Iterator[Path]:
    """The folder that the user names, or one for as long as the benchmark runs."""
    if cache is not None:
        yield cache
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class Kept(Generic[Job, Result]):
    """Results in a folder, appended as they come in; only what is missing is run again.

    Args:
        folder: Where they are.
        job: Type of the jobs, a dataclass of plain values.
        result: Type of the results, a dataclass of plain values.
        owner: Of a job, the name of what is compared: each has a file, to be deleted when it
            changes.
    """

    def __init__(
        self,
        folder: Path,
        job: Callable[..., Job],
        result: Callable[..., Result],
        owner: Callable[[Job], str],
    ) -> None:
        self._folder, self._owner = folder, owner
        self.results: dict[Job, Result] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.results[job(**row["job"])] = result(**row["result"])

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that have no result yet."""
        return [job for job in jobs if job not in self.results]

    def add(self, job: Job, result: Result) -> None:
        """Take in one more."""
        self.results[job] = result
        self._folder.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "_" for c in self._owner(job))
        values: dict[str, Any] = {"job": asdict(job), "result": asdict(result)}  # type: ignore[call-overload]
        with (self._folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")


def finish(
    kept: Kept[Job, Result],
    jobs: Sequence[Job],
    work: Callable[[Job], Result],
    processes: int,
    *,
    report_every: int = 100,
) -> tuple[list[str], bool]:
    """Do what is missing; an interrupt loses only what was under way.

    Args:
        kept: Takes in the results.
        jobs: All of them, in the order in which they are begun.
        work: Does one; see :func:`~benchmarks.workers.in_processes`.
        processes: How many at a time; 0 does the work here.
        report_every: Jobs after which the time that is left is told.

    Returns:
        What became of jobs that crashed, and whether the user interrupted.
    """
    missing, crashes, started = kept.missing(jobs), [], time.perf_counter()
    results = in_processes(work, missing, processes)
    try:
        for number, (job, result) in enumerate(results, start=1):
            if isinstance(result, Crash):
                crashes.append(f"{job.key}: {result.reason}")
                print(f"{job.key} crashed", file=sys.stderr)
            else:
                kept.add(job, result)
            if number % report_every == 0 or number == len(missing):
                left = (time.perf_counter() - started) * (len(missing) - number) / number
                print(
                    f"{number}/{len(missing)} runs, about {left / 60:.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
    except KeyboardInterrupt:
        return crashes, True
    finally:
        getattr(results, "close", lambda: None)()
    return crashes, False
