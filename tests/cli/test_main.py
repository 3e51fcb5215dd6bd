"""``gradguard`` itself: its help, its version, what it loads, how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_gradguard
from lightning_gradguard import cli
from tests.cli.terminal import gradguard, run
from tests.record.run_folders import write_made_up_run

COMMANDS = ["watch", "findings", "report", "dashboard", "replay"]
LOADED = "print(sorted({'torch', 'lightning', 'numpy', 'rich', 'wandb'} & set(sys.modules)))"


def test_alone_it_prints_help(tmp_path: Path) -> None:
    done = gradguard(tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == gradguard(tmp_path, "--help").stdout
    for command in COMMANDS:
        assert f"\n    {command}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_in_a_line_to_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])

    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 10
    example = text[text.index("example: ") :].split()
    assert example[1:3] == ["gradguard", command]
    cli._parser().parse_args(example[2:])  # it can be typed


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["watch", "--help"], []])
def test_what_needs_no_run_loads_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom lightning_gradguard.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n{LOADED}"
    )
    done = run(tmp_path, "-c", code)

    assert done.stdout.splitlines()[-1] == "[]"
    assert "gradguard" in done.stdout


@pytest.mark.parametrize("command", [["findings"], ["report"], ["watch"], ["watch", "--once"]])
def test_what_looks_at_a_run_needs_no_torch(tmp_path: Path, command: list[str]) -> None:
    write_made_up_run(tmp_path)
    code = (
        "import sys\nfrom lightning_gradguard.cli import main\n"
        f"main([*{command}, '.'])\n"
        "print('torch' in sys.modules)"
    )
    done = run(tmp_path, "-c", code)

    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "False"


def test_version(tmp_path: Path) -> None:
    done = gradguard(tmp_path, "--version")

    assert done.stdout == f"gradguard {lightning_gradguard.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replay"], "required: DIR"),
        (["findings"], "required: RUN_DIR"),
        (["dashboard", "--entity", "me"], "required: --project"),
        (["look"], "invalid choice: 'look'"),
        (["findings", ".", "--severity", "grave"], "invalid choice: 'grave'"),
        (["watch", ".", "--every", "0"], "must be between 0.05 and 86400 seconds, got 0"),
        (["watch", ".", "--every", "often"], "must be between 0.05 and 86400 seconds, got often"),
    ],
)
def test_what_cannot_be_read_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)

    assert ended.value.code == 2
    assert said in capsys.readouterr().err
