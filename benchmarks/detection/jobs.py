"""One run as a job for another process: train or read it, then judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.detection import runner
from benchmarks.detection.judging import JudgedRun, judge
from benchmarks.detection.peers import all_peers
from benchmarks.detection.programs import ALL
from benchmarks.detection.records import Program, RunResult
from benchmarks.detection.replay import Cache, read_run
from benchmarks.detection.split import side

DEVELOPMENT, HELD_OUT = "development", "held_out"
# The programs were set up by looking at how seeds 0 and 1 ended.
FIRST_SEED = 2


@dataclass(frozen=True)
class Job:
    """A program, a seed, and the folder where the run is kept.

    Attributes:
        program: Its name.
        seed: Its seed.
        steps: Budget.
        folder: Of a `Cache`.
    """

    program: str
    seed: int
    steps: int
    folder: Path

    @property
    def path(self) -> Path:
        """Where the run is kept."""
        return Cache(self.folder).path(self.program, self.seed)


def select(patterns: Sequence[str], sides: Sequence[str]) -> list[Program]:
    """Returns the programs of these sides of the split whose name or family matches a pattern.

    Args:
        patterns: As of a shell; none lets all pass.
        sides: ``"development"``, ``"held_out"``.
    """
    return [
        program
        for program in ALL
        if side(program) in sides
        and (
            not patterns
            or any(
                fnmatchcase(name, pattern)
                for pattern in patterns
                for name in (program.name, program.family)
            )
        )
    ]


def jobs_of(programs: Sequence[Program], seeds: int, folder: Path) -> list[Job]:
    """Returns the jobs, longest first, so that no long one is begun when the others are done."""
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    jobs = [Job(p.name, seed, p.steps, folder) for seed in numbers for p in programs]
    return sorted(jobs, key=lambda job: -job.steps)


def find_program(name: str) -> Program:
    """Returns the program of this name.

    Raises:
        KeyError: If there is none.
    """
    return {program.name: program for program in ALL}[name]


def run_job(job: Job) -> JudgedRun:
    """Trains a program and keeps the run, or takes the run that was kept, and judges it."""
    program = find_program(job.program)
    cache = Cache(job.folder)
    result = cache.load(job.program, job.seed)
    if result is None or result.steps != program.steps:
        result = runner.run(program, job.seed, all_peers(program.steps))
        cache.keep(result)
    return judge(_as_of(program, result))


def rejudge_job(job: Job) -> JudgedRun:
    """Judges a kept run with the detectors as they are now."""
    return judge(read_fresh(job.path))


def read_fresh(path: Path) -> RunResult:
    """Reads a kept run, with label, causes and places as its program has them now."""
    result = read_run(path)
    return _as_of(find_program(result.program), result)


def _as_of(program: Program, result: RunResult) -> RunResult:
    return replace(
        result,
        family=program.family,
        label=runner.label(program, result.score),
        causes=program.causes,
        layers=program.layers,
        onset=program.onset,
    )
