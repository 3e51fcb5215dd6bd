"""Following a run while it is written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from lightning_gradguard.cli.run_follower import RunFollower
from lightning_gradguard.cli.step_rows import last_rows
from lightning_gradguard.record.run_history import RunHistory
from lightning_gradguard.record.run_reader import RunError, read_run
from lightning_gradguard.record.run_writer import HistoryLimits, RunWriter
from tests.record.run_folders import write_events, write_made_up_run
from tests.record.runs import made_up_run


def assert_same_end(seen: RunHistory, run: RunHistory, window: int) -> None:
    """What was followed is the end of what is on disk."""
    assert seen.info == run.info
    for followed, whole in zip(seen.optimizers, run.optimizers, strict=True):
        for name, column in whole.steps.items():
            np.testing.assert_array_equal(followed.steps[name], column[-window:])
        assert followed.latest_times == whole.latest_times
        assert followed.findings == whole.findings
        assert followed.actions == whole.actions
        assert followed.counts == whole.counts


def test_agrees_with_the_reader_at_every_moment_of_a_run_that_is_thinned(tmp_path):
    run, folder = made_up_run(1500, layers=2), tmp_path / "gradguard"
    part = run.optimizers[0]
    rows = last_rows(part.steps, len(part.steps["step"]))
    writer = RunWriter(folder, run.info, limits=HistoryLimits(steps=20_000, timesteps=30_000))
    writer.update(replace(run.info, status="running"))
    follower = RunFollower(tmp_path, window=50)
    sizes = []
    for first in range(0, 1500, 75):
        writer.steps("", rows[first : first + 75])
        writer.times("", [t for t in part.times if first <= t.step < first + 75])
        writer.flush()
        if first == 600:
            write_events(folder, part)
        assert_same_end(follower.look().run, read_run(tmp_path), 50)
        sizes.append((folder / "history" / "steps.csv").stat().st_size)
    writer.update(run.info)
    writer.close()

    assert min(np.diff(sizes)) < 0  # it was thinned indeed
    seen = follower.look()
    assert seen.ended
    assert seen.steps == 1500
    assert_same_end(seen.run, read_run(tmp_path), 50)


def test_several_optimizers(tmp_path):
    both = made_up_run(label="a/b"), made_up_run(label="optimizer1", seed=1)
    info = replace(
        both[0].info, optimizers=tuple(facts for run in both for facts in run.info.optimizers)
    )
    write_made_up_run(
        tmp_path, replace(both[0], info=info, optimizers=both[0].optimizers + both[1].optimizers)
    )

    seen = RunFollower(tmp_path).look().run
    assert [part.label for part in seen.optimizers] == ["a/b", "optimizer1"]
    assert_same_end(seen, read_run(tmp_path), 500)


def test_nothing_is_opened_while_nothing_changes(tmp_path, monkeypatch):
    write_made_up_run(tmp_path)
    follower = RunFollower(tmp_path)
    first = follower.look().run
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("opened"))

    assert_same_end(follower.look().run, first, 500)


def test_another_run_in_the_same_directory_takes_over(tmp_path):
    write_made_up_run(tmp_path, made_up_run(400))
    follower = RunFollower(tmp_path)
    assert follower.look().steps == 400

    write_made_up_run(tmp_path, made_up_run(30), status="running")
    seen = follower.look()
    assert (seen.steps, seen.ended) == (30, False)
    assert_same_end(seen.run, read_run(tmp_path), 500)
    shutil.rmtree(tmp_path / "gradguard")
    with pytest.raises(RunError, match="is there no more"):
        follower.look()


def test_speed_is_that_of_what_was_written(tmp_path):
    run = made_up_run(100)
    rows = last_rows(run.optimizers[0].steps, 100)
    writer = RunWriter(tmp_path / "gradguard", run.info)
    noon = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)
    writer.update(run.info)
    follower = RunFollower(tmp_path, clock=lambda: noon)
    for count, seconds in ((40, 10.0), (60, 20.0)):
        writer.steps("", rows[:count])
        writer.flush()
        steps = tmp_path / "gradguard" / "history" / "steps.csv"
        os.utime(steps, (seconds, seconds))
        seen = follower.look()
        rows = rows[count:]
    writer.close()

    assert seen.now == noon
    assert seen.speed == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 99}', "is of schema 99, and this version"),
        ("{}", "names no schema"),
        ('{"schema": 1, "na', "is damaged"),
    ],
)
def test_a_run_that_turns_unreadable_is_said(tmp_path, text, said):
    write_made_up_run(tmp_path)
    follower = RunFollower(tmp_path)
    follower.look()
    info = tmp_path / "gradguard" / "history" / "run.json"
    assert json.loads(info.read_bytes())["schema"] == 1
    info.write_text(text)

    with pytest.raises(RunError, match=said):
        follower.look()
