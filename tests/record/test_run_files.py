"""What is written of a run is read again, by us and by anybody."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record import EventLog
from lightning_gradguard.record.earlier_runs import this_process
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.run_files import run_info_from_dict, run_info_to_dict
from lightning_gradguard.record.run_history import STEP_COLUMNS, RunInfo
from lightning_gradguard.record.run_reader import RunError, read_run
from lightning_gradguard.record.run_writer import HistoryLimits, RunWriter
from lightning_gradguard.record.table_rows import TIME_COLUMNS
from lightning_gradguard.respond.actions import Action, ActionKind
from tests.record.run_files import ONE, check_all, step_row, time_reading, write_all, write_run
from tests.record.runs import VANISHING, made_up_run

NUMBERS = st.floats(width=32)
NAMES = st.text(min_size=1, max_size=8)
ODD_NAMES = [
    "a,b",
    'quo"te',
    "two\nlines",
    "\r",
    "größe.γ",
    "<script>",
    "#1",
    "back\\slash",
    "step",
]


def history_of(directory: Path) -> Path:
    return directory / "gradguard" / "history"


def writer_in(directory: Path, info: RunInfo = ONE, **more: Any) -> RunWriter:
    return RunWriter(directory / "gradguard", info, **more)


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("",), ("optimizer0", "optimizer1"), ("a/b", "../c")])
def test_a_run_is_read_as_it_was_written(tmp_path: Path, labels: tuple[str, ...]) -> None:
    made = made_up_run(60, 4)
    one = made.optimizers[0]
    described = tuple({**made.info.optimizers[0], "label": label} for label in labels)
    writer = writer_in(tmp_path, info := replace(made.info, optimizers=described))
    log = EventLog(tmp_path / "gradguard" / "events.jsonl")
    for label in labels:
        columns = zip(*(one.steps[name].tolist() for name in STEP_COLUMNS), strict=True)
        writer.steps(label, [StepRecord(int(step), *rest) for step, *rest in columns])
        for matrix, take in ((one.layers, writer.layers), (one.updates, writer.updates)):
            for step, values in zip(matrix.steps, matrix.values, strict=True):
                take(label, int(step), dict(zip(matrix.names, values.tolist(), strict=True)))
        writer.times(label, one.times)
        for finding in one.findings:
            log.write("finding", {"optimizer": label, **finding.to_dict()})
        for action in one.actions:
            log.write("action", {"optimizer": label, **action.to_dict()})
    writer.close()
    log.close()

    run = read_run(tmp_path)

    assert run.info == replace(info, process=this_process())
    assert run.directory == history_of(tmp_path)
    assert tuple(part.label for part in run.optimizers) == labels
    for part in run.optimizers:
        for name, values in one.steps.items():
            np.testing.assert_allclose(part.steps[name], values, rtol=1e-5)
        for found, wanted in ((part.layers, one.layers), (part.updates, one.updates)):
            assert found.names == wanted.names
            np.testing.assert_array_equal(found.steps, wanted.steps)
            np.testing.assert_allclose(found.values, wanted.values, rtol=1e-3)
        assert [reading.step for reading in part.times] == [reading.step for reading in one.times]
        for reading, known in zip(part.times, one.times, strict=True):
            np.testing.assert_allclose(reading.profile, known.profile, rtol=1e-3)
            assert replace(reading, profile=known.profile) == known
        assert (part.findings, part.actions) == (one.findings, one.actions)
        assert part.counts == one.counts


READINGS = st.builds(
    TimeReading,
    module=NAMES,
    part=st.sampled_from(["", "l0", "l1_reverse"]),
    source=st.sampled_from(["exact", "input", "output"]),
    timesteps=st.integers(0, 10**7),
    sequences=st.integers(0, 10**7),
    decay_rate=NUMBERS,
    recency=NUMBERS,
    profile=st.lists(NUMBERS, max_size=256).map(tuple),
    entry=st.lists(NUMBERS, max_size=256).map(tuple),
    causes=st.dictionaries(NAMES, NUMBERS, max_size=2),
    note=st.text(max_size=20),
)


@given(readings=st.lists(READINGS, max_size=4, unique_by=lambda reading: reading.name))
def test_any_reading_is_read_as_it_was_written(
    readings: list[TimeReading], tmp_path_factory: Any
) -> None:
    directory = tmp_path_factory.mktemp("run")
    writer = writer_in(directory)
    writer.times("", readings)
    writer.update(ONE)
    writer.close()

    (part,) = read_run(directory).optimizers

    assert len(part.times) == len(readings)
    for found, wanted in zip(part.times, readings, strict=True):
        for name in ("decay_rate", "decay_error", "recency", "profile", "entry"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=1e-44
            )
        assert found.causes.keys() == wanted.causes.keys()
        for name in ("module", "part", "source", "timesteps", "sequences", "note", "step"):
            assert getattr(found, name) == getattr(wanted, name)


@given(
    rows=st.lists(st.dictionaries(NAMES | st.sampled_from(ODD_NAMES), NUMBERS, max_size=4)),
    flush_every=st.integers(1, 3),
)
def test_layers_come_and_go(
    rows: list[dict[str, float]], flush_every: int, tmp_path_factory: Any
) -> None:
    directory = tmp_path_factory.mktemp("run")
    writer = writer_in(directory)
    for step, norms in enumerate(rows):
        writer.layers("", step, norms)
        if step % flush_every == 0:
            writer.flush()
    writer.update(ONE)
    writer.close()

    (part,) = read_run(directory).optimizers

    assert part.layers.names == tuple(dict.fromkeys(name for norms in rows for name in norms))
    assert part.layers.steps.tolist() == list(range(len(rows)))
    for found, norms in zip(part.layers.values, rows, strict=True):
        wanted = [norms.get(name, math.nan) for name in part.layers.names]
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-44)


@given(
    name=st.text(),
    planned=st.none() | st.integers(0),
    settings=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()),
    optimizers=st.lists(st.fixed_dictionaries({"label": st.text(), "lr": st.just(0.1)})),
)
def test_what_a_run_is_goes_through_json(
    name: str, planned: int | None, settings: dict[str, Any], optimizers: list[dict[str, Any]]
) -> None:
    info = RunInfo(
        name, planned_steps=planned, settings=settings, optimizers=tuple(optimizers), error="a"
    )
    text = json.dumps(run_info_to_dict(info), allow_nan=False)
    assert run_info_from_dict(json.loads(text)) == info


def test_of_a_later_version_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "gradguard", range(3))
    log = EventLog(tmp_path / "gradguard" / "events.jsonl")
    log.write("finding", {"optimizer": "", **VANISHING.to_dict(), "pathology": "bored"})
    log.write("finding", {"optimizer": "", **VANISHING.to_dict()})
    log.write("action", {"optimizer": "", **Action(ActionKind.SKIP, 1, "s").to_dict(), "kind": "x"})
    log.write("omen", {"optimizer": ""})
    log.close()
    info = history_of(tmp_path) / "run.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "mood": "good"}))

    (part,) = read_run(tmp_path).optimizers

    assert (part.findings, part.actions) == ((VANISHING,), ())


def test_findings_are_read_as_they_stand(tmp_path: Path) -> None:
    write_run(tmp_path / "gradguard", range(3))
    spike = Finding(Pathology.LOSS_SPIKE, Severity.INFO, "loss", 20, {}, "A jump")
    worse = replace(spike, severity=Severity.WARNING, step=25)
    again = replace(spike, step=90)
    early = replace(VANISHING, step=22, since=12)
    log = EventLog(tmp_path / "gradguard" / "events.jsonl")
    for finding in (spike, early, worse, replace(worse, until=40), again):
        log.write("finding", {"optimizer": "", **finding.to_dict()})
    for step in (10, 85, 92):
        log.write("action", {"optimizer": "", **Action(ActionKind.SKIP, step, "s").to_dict()})
    # From a checkpoint of step 80 on, everything happens once more.
    log.write("resumed", {"optimizer": "", "step": 80})
    log.write("finding", {"optimizer": "", **again.to_dict()})
    log.write("finding", {"optimizer": "", **replace(again, until=95).to_dict()})
    for step in (85, 85):
        log.write("action", {"optimizer": "", **Action(ActionKind.SKIP, step, "s").to_dict()})
    log.close()

    (part,) = read_run(tmp_path).optimizers

    assert part.findings == (replace(worse, until=40), early, replace(again, until=95))
    assert [action.step for action in part.actions] == [10, 85, 85]


# -- by anybody -----------------------------------------------------------------------------------


def written_for_anybody(directory: Path) -> Path:
    writer = writer_in(directory)
    for step in range(0, 20, 2):
        writer.steps("", [step_row(step, skipped=step == 6, norm=math.nan if step == 8 else None)])
        writer.layers("", step, {"encoder.0": step / 3, "a,b": math.inf})
        writer.updates("", step, {"encoder.0": 1e-5 * step})
        writer.times("", [time_reading(step), time_reading(step, "l1")])
    writer.layers("", 20, {"encoder.0": 0.5, 'new "one"': 2.0})
    writer.close()
    return history_of(directory)


def test_pandas_alone_reads_every_table(tmp_path: Path) -> None:
    history = written_for_anybody(tmp_path)

    steps = pd.read_csv(history / "steps.csv", index_col="step")
    assert steps.index.tolist() == list(range(0, 20, 2))
    assert steps.columns.tolist() == list(STEP_COLUMNS[1:])
    assert steps.index[steps["skipped"] == 1].tolist() == [6]
    assert steps.index[steps["total_norm"].isna()].tolist() == [8]
    assert steps.index[steps["loss"].isna()].tolist() == [0, 14]
    assert steps.loc[4, "clip_threshold"] == math.inf

    layers = pd.read_csv(history / "layers.csv", index_col="step")
    assert layers.columns.tolist() == ["encoder.0", "a,b", 'new "one"']
    assert layers.loc[4, "encoder.0"] == 1.333
    assert layers.loc[4, "a,b"] == math.inf
    assert layers['new "one"'].dropna().to_dict() == {20: 2.0}

    updates = pd.read_csv(history / "updates.csv", index_col="step")
    assert updates["encoder.0"].tolist() == pytest.approx([1e-5 * s for s in range(0, 20, 2)])

    times = pd.read_csv(history / "timesteps.csv", index_col="step")
    last = times[times["part"] == "l1"].loc[18]
    assert last["decay_rate"] == -18 / 8
    assert last.filter(regex=r"^p\d").dropna().tolist() == [0.125, 0.25, 9.0]
    assert json.loads(last["causes"]) == {"forget_gate": 0.875}


def test_numpy_alone_reads_every_table(tmp_path: Path) -> None:
    history = written_for_anybody(tmp_path)

    steps = np.genfromtxt(history / "steps.csv", delimiter=",", names=True)
    assert steps.dtype.names == STEP_COLUMNS
    assert steps["step"].tolist() == list(range(0, 20, 2))
    assert np.flatnonzero(np.isnan(steps["total_norm"])).tolist() == [4]

    for name, layers in (("layers.csv", 3), ("updates.csv", 1)):
        with (history / name).open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file))
        assert len(header) == 1 + layers
        values = np.loadtxt(history / name, delimiter=",", skiprows=1, ndmin=2)
        assert values.shape == (11 if name == "layers.csv" else 10, 1 + layers)
        assert values[2, 1] == pytest.approx(4 / 3 if layers == 3 else 4e-5, rel=1e-3)

    # Text with commas stands behind the numbers.
    numbers = [number for number, name in enumerate(TIME_COLUMNS) if name[0] not in "mkcn"]
    times = np.genfromtxt(
        history / "timesteps.csv", delimiter=",", names=True, usecols=numbers, encoding="utf-8"
    )
    assert times["step"].tolist() == sorted(2 * list(range(0, 20, 2)))
    assert times["decay_rate"].tolist() == [-step / 8 for step in times["step"]]
    assert times["p2"].tolist() == [step / 2 for step in times["step"]]


def test_odd_names_stay_in_one_line(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    writer.layers("", 0, dict.fromkeys(ODD_NAMES, 1.0))
    writer.close()
    lines = (history_of(tmp_path) / "layers.csv").read_bytes().splitlines()
    assert len(lines) == 2
    table = pd.read_csv(history_of(tmp_path) / "layers.csv", index_col=0)
    assert table.shape == (1, len(ODD_NAMES))
    assert read_run(tmp_path).optimizers[0].layers.names == tuple(ODD_NAMES)


# -- a run that goes on, and one that begins anew -------------------------------------------------


@pytest.mark.parametrize("again_from", [0, 1, 20, 37, 39, 40])
def test_a_resumed_run_replaces_what_it_does_again(tmp_path: Path, again_from: int) -> None:
    write_run(tmp_path / "gradguard", range(40))
    write_run(tmp_path / "gradguard", range(again_from, again_from + 5), resumed=True)
    assert check_all(read_run(tmp_path)) == list(range(again_from + 5))
    assert [path.name for path in (tmp_path / "gradguard").iterdir()] == ["history"]


def test_steps_that_are_done_again_before_they_are_flushed(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    write_all(writer, [*range(10), *range(4, 6)])
    write_all(writer, [*range(6, 12), 3])
    writer.close()
    assert check_all(read_run(tmp_path)) == [0, 1, 2, 3]


def test_an_earlier_run_is_put_aside_with_its_events(tmp_path: Path) -> None:
    directory = tmp_path / "gradguard"
    for run in range(6):
        writer = RunWriter(directory, replace(ONE, name=f"run {run}"))
        log = EventLog(directory / "events.jsonl")
        log.write("finding", {"optimizer": "", **replace(VANISHING, step=run).to_dict()})
        log.close()
        write_all(writer, range(run + 1))
        writer.close()

    folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
    assert folders == ["history", "history-3", "history-4", "history-5"]
    for name, number in [("history-3", 2), ("history-5", 4), ("history", 5)]:
        run = read_run(directory / name)
        assert run.info.name == f"run {number}"
        assert check_all(run) == list(range(number + 1))
        assert [finding.step for finding in run.findings] == [number]


def test_a_run_without_events_does_not_show_those_of_the_next(tmp_path: Path) -> None:
    write_run(tmp_path, range(3))
    write_run(tmp_path, range(3))
    log = EventLog(tmp_path / "events.jsonl")
    log.write("finding", {"optimizer": "", **VANISHING.to_dict()})
    log.close()
    assert read_run(tmp_path / "history-1").findings == []
    assert read_run(tmp_path).findings == [VANISHING]


def test_a_run_that_ended_before_its_first_step_is_not_kept(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, replace(ONE, name="ended early"))
    writer.update(writer.info)
    writer.close()
    write_run(tmp_path, range(2))
    assert [path.name for path in tmp_path.iterdir()] == ["history"]


def test_a_resumed_run_does_not_continue_another_format(tmp_path: Path) -> None:
    write_run(tmp_path, range(3))
    info = tmp_path / "history" / "run.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "schema": 2}))
    write_run(tmp_path, range(3, 5), resumed=True)
    assert check_all(read_run(tmp_path)) == [3, 4]
    assert (tmp_path / "history-1" / "steps.csv").exists()


# -- nothing, and what cannot be written ----------------------------------------------------------


def test_without_content_nothing_is_made(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    writer.steps("", [])
    writer.flush()
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_writer_can_be_used_on(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    write_all(writer, range(3))
    writer.close()
    write_all(writer, range(3, 5))
    writer.close()
    assert check_all(read_run(tmp_path)) == [0, 1, 2, 3, 4]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "gradguard").write_text("")
    writer = writer_in(tmp_path)
    writer.steps("", [step_row(0)])
    with pytest.raises(OSError, match="gradguard"):
        writer.flush()
    with pytest.raises(OSError, match="gradguard"):
        writer.update(ONE)
    writer.close()


def test_an_earlier_run_that_cannot_be_put_aside_is_told_by_the_first_flush(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("{}\n")
    (tmp_path / "history").write_text("in the way")
    writer = RunWriter(tmp_path, ONE)
    for _ in range(2):
        writer.steps("", [step_row(0)])
        with pytest.raises(OSError, match="history"):
            writer.flush()
    writer.close()
    assert (tmp_path / "events.jsonl").read_text() == "{}\n"


@pytest.mark.skipif(os.name == "nt", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [2_500, 2_777, 3_543])
def test_a_full_disk_leaves_whole_rows_and_the_writer_can_go_on(tmp_path: Path, limit: int) -> None:
    import resource

    writer = writer_in(tmp_path)
    write_all(writer, range(50))
    told = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file may be larger
    try:
        for start in range(50, 150, 10):
            writer.steps("", [step_row(step) for step in range(start, start + 10)])
            told += not flushes(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < told < 10
    before = check_all(read_run(tmp_path))
    assert before == list(range(150 - 10 * told))  # all of a flush or nothing
    write_all(writer, range(150, 155))
    writer.close()
    assert check_all(read_run(tmp_path)) == [*before, *range(150, 155)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_table_on_a_full_disk_can_be_closed(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    writer.update(ONE)
    (history_of(tmp_path) / "steps.csv").symlink_to("/dev/full")
    writer.steps("", [step_row(0)])
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    writer.close()
    (tmp_path / "gradguard" / "events.jsonl").symlink_to("/dev/full")  # of which there is no end
    assert len(read_run(tmp_path).optimizers[0].steps["step"]) == 0


def flushes(writer: RunWriter) -> bool:
    try:
        writer.flush()
    except OSError:
        return False
    return True


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="steps must be an integer >= 1000, got 10"):
        HistoryLimits(steps=10)
    with pytest.raises(TypeError, match=r"timesteps must be an integer >= 1000, got 1.5"):
        HistoryLimits(timesteps=1.5)  # type: ignore[arg-type]


# -- what cannot be read --------------------------------------------------------------------------


def test_a_run_is_found_from_each_of_its_directories(tmp_path: Path) -> None:
    write_run(tmp_path / "gradguard", range(3))
    for given_directory in (tmp_path, tmp_path / "gradguard", history_of(tmp_path)):
        assert check_all(read_run(str(given_directory))) == [0, 1, 2]


def test_a_run_without_a_step_is_empty(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    writer.update(ONE)
    writer.close()
    (part,) = read_run(tmp_path).optimizers
    assert {name: values.tolist() for name, values in part.steps.items()} == {
        name: [] for name in STEP_COLUMNS
    }
    assert part.layers.values.shape == (0, 0)
    assert (part.times, part.findings, part.actions) == ((), (), ())


def test_a_label_that_is_not_in_the_description_is_found(tmp_path: Path) -> None:
    writer = writer_in(tmp_path, RunInfo())
    write_all(writer, range(3), "optimizer0")
    write_all(writer, range(5), "optimizer1")
    writer.close()
    run = read_run(tmp_path)
    assert check_all(run, "optimizer0") == [0, 1, 2]
    assert check_all(run, "optimizer1") == [0, 1, 2, 3, 4]


def sentence(directory: Path) -> str:
    with pytest.raises(RunError) as raised:
        read_run(directory)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    assert sentence(tmp_path / "no") == f"{tmp_path / 'no'} does not exist"
    assert sentence(tmp_path) == (
        f"{tmp_path} has no run in it: there is no gradguard/history/run.json"
    )
    (tmp_path / "file").write_text("")
    assert sentence(tmp_path / "file").endswith("is a file, not the directory of a run")


def test_a_directory_of_runs_names_the_newest(tmp_path: Path) -> None:
    for number in range(12):
        run = tmp_path / "lightning_logs" / f"version_{number}"
        write_run(run / "gradguard", range(2))
        os.utime(history_of(run) / "run.json", (number, number))
    for directory in (tmp_path, tmp_path / "lightning_logs"):
        text = sentence(directory)
        logs = tmp_path / "lightning_logs"
        assert text.endswith(
            f"{logs / 'version_11'}, {logs / 'version_10'}, {logs / 'version_9'} and 9 more"
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is damaged: it is not JSON"),
        ('{"schema": 1, "na', "is damaged: it is not JSON"),
        ("[1]", "it names no schema"),
        ("{}", "it names no schema"),
        ('{"schema": 2}', "is of schema 2, and this version of lightning-gradguard reads schema 1"),
    ],
)
def test_a_run_json_that_cannot_be_used(tmp_path: Path, text: str, says: str) -> None:
    write_run(tmp_path, range(2))
    (tmp_path / "history" / "run.json").write_text(text)
    assert says in sentence(tmp_path)
