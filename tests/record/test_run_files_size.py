"""A run of a million steps stays under 50 MB, at any moment, and is read in seconds."""

from __future__ import annotations

import inspect
import time
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest

from lightning_gradguard.record import EventLog
from lightning_gradguard.record.run_reader import read_run
from lightning_gradguard.record.run_writer import HistoryLimits, RunWriter
from lightning_gradguard.respond.actions import Action, ActionKind
from tests.record.run_files import ONE, step_row, time_reading

BOUND = 50_000_000


def test_the_defaults_and_a_copy_of_the_largest_table_stay_under_50_mb() -> None:
    tables = astuple(HistoryLimits())
    events = inspect.signature(EventLog).parameters["max_bytes"].default
    assert sum(tables) + max(tables) + events <= BOUND


@pytest.mark.slow
def test_a_million_steps_of_a_thousand_layers(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    writer = RunWriter(tmp_path, ONE)
    log = EventLog(tmp_path / "events.jsonl")
    norms = {f"model.layers.{number}.mlp": norm for number, norm in enumerate(noise.random(1000))}
    curve = tuple(noise.random(256).tolist())
    peak, largest = 123_456, 0
    for first in range(0, 1_000_000, 50):
        rows = [
            step_row(step, norm=1e9 if step == peak else None) for step in range(first, first + 50)
        ]
        writer.steps("", rows)
        writer.layers("", first, norms)
        if first % 100 == 0:
            writer.updates("", first, norms)
        reading = replace(time_reading(first), profile=curve)
        writer.times("", [replace(reading, module=f"rnn{number}") for number in range(2)])
        log.write("action", Action(ActionKind.SKIP, first, "Step dropped: " + 100 * "x").to_dict())
        if first % 500 == 0:
            writer.flush()
        if first % 10_000 == 0:
            files = (path for path in tmp_path.rglob("*") if path.is_file())
            largest = max(largest, sum(path.stat().st_size for path in files))
    writer.close()
    log.close()
    assert 30_000_000 < largest < BOUND

    start = time.process_time()
    (part,) = read_run(tmp_path).optimizers
    assert time.process_time() - start < 10

    steps = part.steps["step"]
    assert part.steps["total_norm"].max() == 1e9
    assert np.diff(steps[-80_000:]).max() == 1
    assert np.diff(steps).max() < 100
    assert part.layers.values.shape[1] == 1000
    assert np.diff(part.layers.steps[-400:]).max() == 50
    assert part.layers.steps[0] == 0
    assert np.diff(part.layers.steps).max() < 20_000
