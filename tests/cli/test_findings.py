"""``gradguard findings``: what was found, for people and programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_gradguard import cli
from lightning_gradguard.record import OptimizerReport, Report
from tests.cli.terminal import gradguard, run, without
from tests.record.run_folders import write_made_up_run
from tests.record.runs import made_up_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log directory with a run of two findings."""
    path = tmp_path_factory.mktemp("run")
    write_made_up_run(path)
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert cli.main(["findings", *map(str, arguments)]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return told.out


def test_is_the_report_of_the_end_of_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = made_up_run().optimizers
    report = Report(
        (OptimizerReport(part.findings, part.actions, part.counts, time=part.latest_times),)
    )

    assert said(capsys, folder) == f"{report}\n"
    assert said(capsys, folder / "gradguard") == f"{report}\n"


def test_json_is_one_object_with_all_of_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(said(capsys, folder, "--json"))

    (part,) = values["optimizers"]
    assert [finding["pathology"] for finding in part["findings"]] == [
        "vanishing_in_time",
        "exploding",
    ]
    assert part["findings"][0]["remedies"][0]["code"] == "self.rnn = nn.LSTM(64, 128)"
    assert part["counts"]["steps"] == 400
    assert [action["kind"] for action in part["actions"]] == ["skip", "back_off"]


def test_what_is_less_severe_is_left_out_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, folder, "--severity", "critical")
    assert "vanishing_in_time" not in text
    assert "exploding in model" in text
    assert text.endswith("\n1 finding is less severe than critical and left out.\n")

    values = json.loads(said(capsys, folder, "--severity", "critical", "--json"))
    assert len(values["optimizers"][0]["findings"]) == 1
    assert said(capsys, folder, "--severity", "info") == said(capsys, folder)


def test_all_are_told_by_step_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up_run(label="critic")
    (part,) = run.optimizers
    many = tuple(replace(part.findings[0], where=f"rnn.{n}", step=500 - n) for n in range(60))
    other = replace(part, label="generator", findings=many)
    facts = ({"label": "critic"}, {"label": "generator"})
    run = replace(run, info=replace(run.info, optimizers=facts), optimizers=(part, other))
    write_made_up_run(tmp_path, run)

    lines = said(capsys, tmp_path, "--all").splitlines()
    assert len(lines) == 62
    steps = [int(line.split()[1].removesuffix(":")) for line in lines]
    assert steps == sorted(steps)
    assert lines[0].startswith("step 120: warning: [critic] vanishing_in_time in encoder.rnn, ")
    assert lines[1].startswith("step 200: critical: [critic] exploding in model, steps 200-205, ")


def test_in_a_terminal_of_its_own(folder: Path, tmp_path: Path) -> None:
    done = gradguard(tmp_path, "findings", str(folder))
    assert (done.returncode, done.stderr) == (0, "")  # also with findings
    assert done.stdout.startswith("GradGuard report\n2 findings (1 critical, 1 warning; 1 healed)")

    plain = without({"rich", "plotly", "matplotlib", "wandb"}, tmp_path, "findings", str(folder))
    assert plain.stdout == done.stdout


def test_a_reader_that_leaves_early_is_no_error(folder: Path, tmp_path: Path) -> None:
    command = f"-m lightning_gradguard.cli findings {folder} --json"
    code = (
        "import subprocess, sys\n"
        f"done = subprocess.Popen([sys.executable, *{command.split()}], stdout=subprocess.PIPE)\n"
        "done.stdout.close()\n"
        "print(done.wait())"
    )
    done = run(tmp_path, "-c", code)
    assert (done.stdout, done.stderr) == ("141\n", "")
