"""A table stays within its bound, its newest rows are all there, and no peak of it is lost."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_gradguard.record import EventLog, read_events
from lightning_gradguard.record.run_reader import read_run
from lightning_gradguard.record.run_writer import HistoryLimits, RunWriter
from lightning_gradguard.record.table_file import csv_cells, csv_line
from lightning_gradguard.record.thinning import Facts, not_done_again, thinned
from tests.record.run_files import ONE, check_all, layer_norms, step_row, time_reading, write_all

SMALL = HistoryLimits(steps=4000, layers=3000, updates=2000, timesteps=20_000)


@given(cells=st.lists(st.text(), min_size=1, max_size=5))
@example(cells=["\ud800", "\\u000a", "\x00", ""])
def test_a_line_is_a_row(cells: list[str]) -> None:
    line = csv_line(cells)
    assert line.splitlines() == [line[:-1]]
    assert csv_cells(line) == cells


@given(steps=st.lists(st.integers(0, 12)), shared=st.booleans())
def test_what_is_done_again_is_dropped(steps: list[int], shared: bool) -> None:
    kept: list[int] = []
    for step in steps:
        while kept and (kept[-1] > step or (kept[-1] == step and not shared)):
            kept.pop()
        kept.append(step)
    array = np.array(steps, np.int64)
    assert array[not_done_again(array, shared=shared)].tolist() == kept


ROWS = st.lists(
    st.tuples(
        st.integers(1, 50),  # steps since the row before
        st.floats(0, 100),
        st.integers(0, 2),
        st.booleans(),
        st.integers(10, 90),
    ),
    min_size=1,
    max_size=60,
)


@given(rows=ROWS, room=st.integers(1, 4000))
def test_what_stays_fits_and_has_the_peak(rows: list[tuple[Any, ...]], room: int) -> None:
    gaps, weights, groups, kept, sizes = map(np.array, zip(*rows, strict=True))
    facts = Facts(np.cumsum(gaps), weights.astype(np.float64), groups, kept)
    stays = thinned(facts, sizes, room)
    assert sizes[stays].sum() <= room
    if sizes.sum() <= room:
        assert stays.all()
    if 4 * sizes[kept].sum() <= room:
        assert stays[kept].all(), "there was room for what should stay"
    if 4 * 90 * len(set(groups)) <= room:
        for group in set(groups):
            own = groups == group
            rest = own & ~kept
            assert not rest.any() or weights[own & stays].max() >= weights[rest].max()


def test_the_whole_past_keeps_one_resolution() -> None:
    facts = Facts.of_steps(np.arange(0, 100_000, 10))
    steps = facts.steps[thinned(facts, np.full(10_000, 50), 5000)]
    assert steps[0] == 0
    assert len(steps) == 100
    assert set(np.diff(steps)) == {1000}


@pytest.mark.parametrize("flush_every", [1, 7, 500])
def test_a_long_run_is_bounded_and_none_of_its_peaks_is_lost(
    tmp_path: Path, flush_every: int
) -> None:
    writer = RunWriter(tmp_path, ONE, limits=SMALL)
    history = tmp_path / "history"
    peaks = {333: 1e6, 1200: math.nan, 2001: 1e7}
    bounds = {"steps.csv": SMALL.steps, "layers.csv": SMALL.layers, "updates.csv": SMALL.updates}
    for step in range(3000):
        writer.steps("", [step_row(step, skipped=step % 250 == 3, norm=peaks.get(step, 1.0))])
        writer.layers("", step, layer_norms(step))
        writer.updates("", step, layer_norms(step, 2))
        if step % flush_every == 0:
            writer.flush()
            assert all((history / name).stat().st_size <= bounds[name] for name in bounds)
    writer.close()

    (part,) = read_run(tmp_path).optimizers

    steps, norms = part.steps["step"], part.steps["total_norm"]
    assert {int(s) for s in steps[part.steps["skipped"] > 0]} == set(range(3, 3000, 250))
    assert {int(s) for s in steps[~(norms < 10)]} == set(peaks)
    for found in (steps, part.layers.steps, part.updates.steps):
        newest = found[-len(found) // 3 :]
        assert newest[-1] == 2999
        assert set(np.diff(newest)) == {1}, "a new row was thinned out"
        older = found[: len(found) // 4]
        assert older[0] < 300
        assert np.diff(older).max() < 600, "a part of the past is gone"


def test_each_series_of_readings_is_thinned_by_itself(tmp_path: Path) -> None:
    """One is measured a hundred times as often as the other."""
    writer = RunWriter(tmp_path, ONE, limits=HistoryLimits(timesteps=80_000))
    for step in range(2000):
        writer.times("", [time_reading(step)])
        if step % 100 == 0:
            writer.times("", [time_reading(step, "l1")])
        if step % 10 == 0:
            writer.flush()
    writer.close()
    assert (tmp_path / "history" / "timesteps.csv").stat().st_size <= 80_000
    run = read_run(tmp_path)
    check_all(run)
    (part,) = run.optimizers
    for name, last in (("l0", 1999), ("l1", 1900)):
        seen = [reading.step for reading in part.times if reading.part == name]
        assert (seen[0], seen[-1]) == (0, last)
        assert len(seen) >= 8
    latest = [reading.step for reading in part.times if reading.part == "l0"][-5:]
    assert latest == list(range(1995, 2000))


def test_skipped_steps_that_would_fill_the_table_are_thinned_too(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, ONE, limits=SMALL)
    for step in range(2000):
        writer.steps("", [step_row(step, skipped=True)])
        writer.flush()
    writer.close()
    assert (tmp_path / "history" / "steps.csv").stat().st_size <= SMALL.steps
    steps = read_run(tmp_path).optimizers[0].steps["step"]
    assert steps[-20:].tolist() == list(range(1980, 2000))
    assert steps[0] < 200


def test_a_row_larger_than_the_bound_is_kept_until_the_next(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, ONE, limits=SMALL)
    for step in range(5):
        writer.layers("", step, layer_norms(step, 1000))
        writer.flush()
        assert read_run(tmp_path).optimizers[0].layers.steps.tolist() == [step]
    writer.close()


def test_optimizers_share_the_bound(tmp_path: Path) -> None:
    labels = [f"optimizer{number}" for number in range(4)]
    info = type(ONE)("gan", optimizers=tuple({"label": label} for label in labels))
    writer = RunWriter(tmp_path, info, limits=HistoryLimits(8000, 8000, 8000, 80_000))
    for step in range(0, 1000, 10):
        for label in labels:
            write_all(writer, range(step, step + 10), label)
    writer.close()
    for name, bound in (
        ("steps", 8000),
        ("layers", 8000),
        ("updates", 8000),
        ("timesteps", 80_000),
    ):
        assert sum(file.stat().st_size for file in tmp_path.rglob(f"{name}.csv")) <= bound
    for label in labels:
        assert check_all(read_run(tmp_path), label)[-1] == 999


@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 300), st.integers(1, 40), st.booleans()), min_size=1, max_size=8
    )
)
def test_whatever_comes_a_table_is_bounded_and_ascends(
    pieces: list[tuple[int, int, bool]], tmp_path_factory: Any
) -> None:
    """Steps that go back or leap ahead, with the writer closed in between or not."""
    directory = tmp_path_factory.mktemp("run")
    writer = RunWriter(directory, ONE, limits=SMALL)
    for start, count, closes in pieces:
        write_all(writer, range(start, start + count))
        if closes:
            writer.close()
            writer = RunWriter(directory, ONE, resumed=True, limits=SMALL)
    writer.close()
    steps = check_all(read_run(directory))
    start, count, _ = pieces[-1]
    last = list(range(start, start + count))
    assert steps[-min(count, 20) :] == last[-20:]
    for name in ("steps", "layers", "updates", "timesteps"):
        assert (directory / "history" / f"{name}.csv").stat().st_size <= getattr(SMALL, name)


# -- events ---------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 900), min_size=1, max_size=60), reopen=st.integers(1, 60))
@example(sizes=[0] * 5 + [335, 489, 516, 900, 227, 900, 900, 0, 40, 900, 900], reopen=1)
def test_events_keep_how_they_began_and_the_latest(
    sizes: list[int], reopen: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    log = EventLog(path, max_bytes=5000)
    for number, size in enumerate(sizes):
        log.write("action", {"number": number, "message": "x" * size})
        assert path.stat().st_size <= 5000
        if number == reopen:
            log.close()
    log.close()
    events = list(read_events(path))
    numbers = [event["number"] for event in events if event["event"] == "action"]
    assert numbers[-1] == len(sizes) - 1
    assert numbers[0] == 0
    assert all(a < b for a, b in pairwise(numbers))
    gaps = [b - a for a, b in pairwise(numbers) if b - a > 1]
    assert len(gaps) <= 1, "something other than the middle is missing"
    assert len(gaps) <= sum(event["event"] == "left_out" for event in events)
    if sum(sizes) + 70 * len(sizes) < 5000:
        assert numbers == list(range(len(sizes)))


def test_an_event_larger_than_the_bound_is_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", max_bytes=1000)
    for number in range(3):
        log.write("action", {"number": number, "message": "x" * 3000})
    log.close()
    assert [event.get("number") for event in read_events(log.path)] == [None, 2]


def test_the_bound_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 1000, got 0"):
        EventLog(tmp_path / "events.jsonl", max_bytes=0)
