"""``gradguard dashboard``, as far as it goes without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_gradguard import cli
from tests.cli.terminal import gradguard, without

WHERE = ("dashboard", "--entity", "my-team", "--project", "my-project")


@pytest.mark.slow
def test_dry_run_prints_the_workspace_as_json(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")

    done = gradguard(tmp_path, *WHERE, "--name", "Mine", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    workspace = json.loads(done.stdout)
    assert (workspace["entity"], workspace["project"]) == ("my-team", "my-project")
    assert workspace["displayName"] == "Mine"


@pytest.mark.slow
def test_who_is_not_logged_in_is_told(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")

    # No keys but those of this folder, and nowhere to send anything to.
    nobody = {"WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    done = gradguard(tmp_path, *WHERE, environment={**nobody, "NETRC": str(tmp_path / "netrc")})
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith("gradguard: error: the workspace cannot be saved: UsageError: ")


def test_a_name_that_is_not_allowed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dashboard", "--entity", "", "--project", "p", "--dry-run"]) == 2

    said = capsys.readouterr().err
    assert said == "gradguard: error: entity must be a name, got ''\n"


def test_a_missing_extra_is_said(tmp_path: Path) -> None:
    done = without({"wandb_workspaces"}, tmp_path, *WHERE, "--dry-run")

    assert done.returncode == 2
    assert done.stderr == (
        "gradguard: error: wandb_workspaces is not installed; get it with: "
        "pip install 'lightning-gradguard[dashboard]'\n"
    )
