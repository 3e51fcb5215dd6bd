"""Whenever its writer is killed, and wherever a file is cut off, a history is read and goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.record.run_history import OptimizerHistory
from lightning_gradguard.record.run_reader import read_run
from tests.record.run_files import check_all, write_run

CHECKOUT = Path(__file__).resolve().parents[2]
TABLES = ("steps", "layers", "updates", "timesteps")
KILLS = 16


def steps_of(part: OptimizerHistory, table: str) -> list[int]:
    if table == "timesteps":
        return [reading.step for reading in part.times]
    steps = part.steps["step"] if table == "steps" else getattr(part, table).steps
    return [int(step) for step in steps]


@given(data=st.data(), table=st.sampled_from(TABLES))
def test_a_table_that_is_cut_off_anywhere_is_read_up_to_there(
    data: st.DataObject, table: str, tmp_path_factory: Any
) -> None:
    directory = tmp_path_factory.mktemp("run")
    write_run(directory, range(12))
    path = directory / "history" / f"{table}.csv"
    whole = path.read_bytes()
    end = data.draw(st.integers(0, len(whole)), label="bytes")
    path.write_bytes(whole[:end])

    run = read_run(directory)

    check_all(run)
    lines = max(whole[:end].count(b"\n") - 1, 0)
    before = steps_of(run.optimizers[0], table)
    assert len(before) == lines
    assert before == sorted(2 * [*range(12)] if table == "timesteps" else range(12))[:lines]

    write_run(directory, range(12, 15), resumed=True)

    run = read_run(directory)
    check_all(run)
    assert set(steps_of(run.optimizers[0], table)) == {*before, 12, 13, 14}
    assert path.read_bytes().startswith(whole[: whole[:end].rfind(b"\n") + 1])


@given(table=st.sampled_from(TABLES), at=st.floats(0, 1), length=st.integers(1, 600))
def test_zeros_where_rows_should_be_are_left_out(
    table: str, at: float, length: int, tmp_path_factory: Any
) -> None:
    """As a machine leaves them that lost its power."""
    directory = tmp_path_factory.mktemp("run")
    write_run(directory, range(12))
    path = directory / "history" / f"{table}.csv"
    whole = path.read_bytes()
    rows = whole.index(b"\n") + 1
    start = rows + int(at * (len(whole) - rows))
    path.write_bytes(
        whole[:start] + bytes(len(whole[start : start + length])) + whole[start + length :]
    )

    found = steps_of(read_run(directory).optimizers[0], table)
    assert set(found) <= set(range(12))
    write_run(directory, range(12, 15), resumed=True)
    again = steps_of(read_run(directory).optimizers[0], table)
    assert set(again) == {*found, 12, 13, 14}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_writer_killed_at_any_point_leaves_a_history_that_goes_on(tmp_path: Path) -> None:
    generator = random.Random(1)
    in_the_middle = 0
    with subprocess.Popen(
        [sys.executable, "-m", "tests.record.run_writer", str(tmp_path)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        last = -1
        for kill in range(KILLS):
            # Sometimes from a checkpoint that lies some steps back.
            start = max(0, last + 1 - generator.choice([0, 0, 5]))
            print(start, file=parent.stdin, flush=True)
            # Half of them in the middle of thinning, as near as can be.
            copy = tmp_path / "history" / ".timesteps.csv.new" if kill % 2 else None
            told = killed(parent.stdout, generator.uniform(0.005, 0.15) * (1 + kill % 2), copy)
            in_the_middle += any(tmp_path.rglob("*.new"))
            last = check(tmp_path, max(told, start - 1), start)
    assert in_the_middle  # or the test would show little
    write_run(tmp_path, range(last + 1, last + 4), resumed=True)
    assert check_all(read_run(tmp_path))[-1] == last + 3


def killed(output: IO[str], seconds: float, copy: Path | None) -> int:
    """Kill a writer after some time, or as ``copy`` is seen; returns the last step it has told."""
    told, writer = -1, -1
    while writer < 0:
        line = output.readline()
        if line.startswith("writer"):
            writer = int(line.split()[1])
        else:
            told = int(line)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (copy and copy.exists()):
        time.sleep(0.0 if copy else 0.001)
    os.kill(writer, signal.SIGKILL)
    while (line := output.readline()) != "gone\n":
        told = int(line)
    return told


def check(directory: Path, told: int, start: int) -> int:
    """Nothing that was flushed is lost; returns the last step that every table has."""
    if not (directory / "history" / "run.json").exists():
        assert told < 0
        return -1
    run = read_run(directory)
    check_all(run)
    (part,) = run.optimizers
    last = []
    for table in TABLES:
        found = np.unique(steps_of(part, table))
        last.append(int(found[-1]) if len(found) else -1)
        assert last[-1] >= told, "what was flushed is lost"
        newest = found[found >= max(start, told - 10)]
        assert set(np.diff(newest)) <= {1}, "a new row is missing"
    return min(last)
