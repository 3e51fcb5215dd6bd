"""``gradguard report``: where the page goes, and who opens it."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from lightning_gradguard import cli
from lightning_gradguard.record.run_reader import read_run
from tests.cli.terminal import gradguard
from tests.record.run_folders import write_made_up_run
from tests.record.runs import made_up_run


def test_is_written_where_the_end_of_a_fit_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path)
    path = tmp_path / "gradguard" / "report.html"

    for directory in (tmp_path, tmp_path / "gradguard", tmp_path / "gradguard" / "history"):
        path.unlink(missing_ok=True)
        assert cli.main(["report", str(directory)]) == 0
        assert capsys.readouterr().out == f"{path}\n"
        text = path.read_text(encoding="utf-8")
        assert "vanishes through time" in text
        assert "lightning_logs/version_0" in text


def test_that_of_an_earlier_run_stays_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path)
    write_made_up_run(tmp_path, made_up_run(30))
    earlier = tmp_path / "gradguard" / "history-1"

    assert cli.main(["report", str(earlier)]) == 0
    assert capsys.readouterr().out == f"{earlier / 'report.html'}\n"
    assert len(read_run(earlier).optimizers[0].steps["step"]) == 400


def test_elsewhere_and_compared_with_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path / "a")
    write_made_up_run(tmp_path / "b", made_up_run(77, seed=1))
    alone, both = tmp_path / "alone.html", tmp_path / "new" / "both.html"

    assert cli.main(["report", str(tmp_path / "a"), "--output", str(alone)]) == 0
    compared = ["report", str(tmp_path / "a"), "--compare", str(tmp_path / "b")]
    assert cli.main([*compared, "--output", str(both)]) == 0
    assert capsys.readouterr().out == f"{alone}\n{both}\n"
    assert alone.read_text(encoding="utf-8") != both.read_text(encoding="utf-8")


def test_a_directory_to_write_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path)

    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == f"gradguard: error: --output must be a file, got the directory {tmp_path}\n"


def test_a_path_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path / "run")
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "report.html"

    assert cli.main(["report", str(tmp_path / "run"), "--output", str(path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"gradguard: error: {path} cannot be written (")


@pytest.mark.skipif(sys.platform == "win32", reason="a browser of Windows is no program to name")
def test_open_hands_it_to_the_browser(tmp_path: Path) -> None:
    write_made_up_run(tmp_path)
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(browser.stat().st_mode | stat.S_IEXEC)

    done = gradguard(tmp_path, "report", ".", "--open", environment={"BROWSER": f"{browser} %s"})
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "gradguard" / "report.html").resolve()
    assert (tmp_path / "opened").read_text().strip() == page.as_uri()

    # Neither a browser nor a program that finds one.
    nothing = {"BROWSER": "", "PATH": str(tmp_path), "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    done = gradguard(tmp_path, "report", ".", "--open", environment=nothing)
    if sys.platform == "linux":
        assert done.returncode == 2
        assert "no web browser can be opened here; the report is gradguard" in done.stderr
