"""Directories of which nothing can be told: one sentence, exit status 2, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_gradguard import cli
from lightning_gradguard.record.run_writer import RunWriter
from tests.cli.terminal import gradguard
from tests.record.run_folders import write_made_up_run
from tests.record.runs import made_up_run


def _info_of(folder: Path) -> Path:
    return folder / "gradguard" / "history" / "run.json"


def nowhere(folder: Path) -> None:
    folder.rmdir()


def a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("not a run")


def another_directory(folder: Path) -> None:
    (folder / "checkpoints").mkdir()


def a_folder_of_runs(folder: Path) -> None:
    write_made_up_run(folder / "version_0")


def empty_run(folder: Path) -> None:
    info = replace(made_up_run().info, status="failed", error="RuntimeError: no data")
    writer = RunWriter(folder / "gradguard", info)
    writer.update(info)
    writer.close()


def half_written(folder: Path) -> None:
    write_made_up_run(folder)
    path = _info_of(folder)
    path.write_bytes(path.read_bytes()[:99])


def unknown_version(folder: Path) -> None:
    write_made_up_run(folder)
    path = _info_of(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 7}))


def no_counts(folder: Path) -> None:
    write_made_up_run(folder)
    path = _info_of(folder)
    values = json.loads(path.read_text())
    values["optimizers"][0]["counts"] = None
    path.write_text(json.dumps(values))


def an_unknown_plan(folder: Path) -> None:
    write_made_up_run(folder)
    path = _info_of(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "planned_steps": "many"}))


WRONG = {
    no_counts: "run.json is damaged: None is no value of counts",
    an_unknown_plan: "run.json is damaged: 'many' is no value of planned_steps",
    nowhere: "run does not exist",
    a_file: "run is a file, not the directory of a run",
    another_directory: "run has no run in it",
    a_folder_of_runs: "run is not a run itself: choose one of those in it, ",
    empty_run: "run has recorded no step",
    half_written: "run.json is damaged",
    unknown_version: "is of schema 7, and this version of lightning-gradguard reads schema 1",
}
COMMANDS = (["findings"], ["findings", "--json"], ["report"], ["watch"], ["watch", "--once"])


def assert_one_sentence(said: str, expected: str) -> None:
    (line,) = said.splitlines()
    assert line.startswith("gradguard: error: ")
    assert expected in line
    assert "Traceback" not in line


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_every_command_says_what_is_wrong(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    for command in COMMANDS:
        assert cli.main([*command, str(folder)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert_one_sentence(told.err, WRONG[make])


@pytest.mark.parametrize("make", [nowhere, empty_run, half_written, unknown_version])
@pytest.mark.parametrize("command", ["findings", "report", "watch"])
def test_so_does_a_real_terminal(
    make: Callable[[Path], None], command: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    done = gradguard(tmp_path, command, "run")

    assert (done.returncode, done.stdout) == (2, "")
    assert_one_sentence(done.stderr, WRONG[make])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_looked_at_is_said(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, str(tmp_path / ("n" * 300))]) == 2
    assert_one_sentence(capsys.readouterr().err, "cannot be read (File name too long)")


@pytest.mark.parametrize(
    "changes",
    [{"evidence": None}, {"where": None}, {"step": "x"}, {"message": 3}, {"numbers": [1]}],
    ids=str,
)
def test_events_of_another_kind_are_left_out(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path)
    path = tmp_path / "gradguard" / "events.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(json.dumps({**json.loads(line), **changes}) + "\n" for line in lines))

    for command in COMMANDS:
        assert cli.main([*command, str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_the_run_to_compare_with_is_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path / "a")

    assert cli.main(["report", str(tmp_path / "a"), "--compare", str(tmp_path / "b")]) == 2
    assert_one_sentence(capsys.readouterr().err, "b does not exist")
    assert not (tmp_path / "a" / "gradguard" / "report.html").exists()


def test_tables_that_were_cut_short_are_read_as_far_as_they_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path)
    for name in ("history/steps.csv", "history/layers.csv", "events.jsonl"):
        path = tmp_path / "gradguard" / name
        path.write_bytes(path.read_bytes()[:-9])

    assert cli.main(["watch", str(tmp_path)]) == 0
    assert "step 399 of 400" in capsys.readouterr().out
    assert cli.main(["findings", str(tmp_path)]) == 0
    assert "step 200: Step dropped" in capsys.readouterr().out
