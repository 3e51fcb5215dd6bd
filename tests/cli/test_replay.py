"""``gradguard replay`` as a user runs it, on a model of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gradguard import cli
from lightning_gradguard.incidents import list_incidents
from tests.cli.terminal import run

MODELS = """
import dataclasses, math
import torch
from torch import nn
from lightning.pytorch import LightningModule


@dataclasses.dataclass
class Batch:
    inputs: torch.Tensor


class Classifier(LightningModule):
    def __init__(self, hidden: int = 3, scale: tuple = (1.0,)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.ModuleDict({"rnn": nn.GRU(2, hidden, batch_first=True)})
        self.head = nn.Linear(hidden, 1)

    def training_step(self, batch, batch_idx):
        assert isinstance(self.hparams.scale, tuple)
        return self.head(self.encoder["rnn"](batch.inputs)[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def make(hidden):
    return Classifier(hidden)


def needs_more(hidden, data):
    return Classifier(hidden)


number = 3


def not_a_module():
    return number
"""

SCRIPT = """
import logging
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from lightning_gradguard import GradientMonitor
{definitions}

batches = [Batch(torch.randn(4, 9, 2)) for _ in range(6)]
batches[3].inputs[1, 7] = float("nan")
trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False,
                  callbacks=[GradientMonitor()])
trainer.fit(Classifier(hidden=5, scale=(2.0, 3.0)), DataLoader(batches, batch_size=None))
torch.save({{"state_dict": Classifier(hidden=5).state_dict()}}, "weights.ckpt")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder after a run with a NaN in a batch."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "models.py").write_text(MODELS)
    script = SCRIPT.format(definitions="from models import Batch, Classifier")
    (folder / "train.py").write_text(script)
    done = run(folder, "train.py")
    assert done.returncode == 0, done.stderr
    assert "gradguard replay" in done.stderr
    assert "--module models:Classifier" in done.stderr
    return folder


def incident_of(folder: Path) -> str:
    (path,) = list_incidents(folder / "gradguard" / "incidents")
    return str(path.relative_to(folder))


FOUND = "First not finite: `inputs` of the batch, at timestep 7 of sample 1."


@pytest.mark.slow
def test_as_it_is_told_in_the_log(project: Path) -> None:
    command = ["-m", "lightning_gradguard.cli", "replay", incident_of(project)]
    done = run(project, *command, "--module", "models:Classifier")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("Incident at step 3 (non_finite), written 2")
    assert f"torch {torch.__version__}, lightning " in first
    assert first.endswith("weights included.")
    assert second == FOUND


@pytest.mark.slow
def test_a_model_defined_in_the_script_itself(tmp_path: Path) -> None:
    """Its classes, and those of its batch, were in ``__main__``."""
    body = SCRIPT.format(definitions=MODELS).replace("\nbatches =", "\ndef main():\n    batches =")
    lines = body.partition("\ndef main():\n")
    inside = "\n".join(f"    {line.lstrip()}" for line in lines[2].splitlines())
    guarded = f'{lines[0]}\ndef main():\n{inside}\n\nif __name__ == "__main__":\n    main()\n'
    (tmp_path / "train.py").write_text(guarded)
    done = run(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    assert "--module train:Classifier" in done.stderr
    done = run(tmp_path, "-m", "lightning_gradguard.cli", "replay", incident_of(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "--module is not given, so train:Classifier is used" in done.stderr
    assert FOUND in done.stdout


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the user's folder, with the modules of nobody else."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    return project


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--checkpoint", "weights.ckpt"]])
def test_one_object_of_json(
    here: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["replay", incident_of(here), "--module", "models:make", "--json", *arguments]
    assert cli.main(command) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert values["origin"]["place"] == "batch"
    assert values["origin"]["timestep"] == 7
    assert bool(values["notes"]) == bool(arguments)


WRONG = {
    "models": "must be of the form package.module:Name, got 'models'",
    "nowhere:Model": "cannot be imported: ModuleNotFoundError",
    "models:Nothing": "cannot be imported: AttributeError",
    "models:number": "must be a class or a function, got 'models:number'",
    "models:not_a_module": "must make an nn.Module, got int",
    "models:needs_more": "cannot be made with hidden: TypeError",
    "torch.nn:Identity": "loss must be given for Identity",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_module_is_said_in_a_sentence(
    here: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", incident_of(here), "--module", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gradguard: error: ")
    assert WRONG[name] in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_wrong_checkpoint_or_device_is_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["replay", incident_of(here), "--module", "models:Classifier"]
    assert cli.main([*command, "--checkpoint", "models.py"]) == 2
    assert "--checkpoint models.py cannot be loaded" in capsys.readouterr().err
    assert cli.main([*command, "--device", "abacus"]) == 2
    assert "gradguard: error: " in capsys.readouterr().err


def test_no_incident_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["replay", str(tmp_path), "--module", "torch.nn:Identity"]) == 2
    assert "is not an incident" in capsys.readouterr().err
