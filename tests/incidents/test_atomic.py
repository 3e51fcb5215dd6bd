"""Nothing half-written is ever read, whenever the writer is killed and whatever is damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gradguard.incidents import (
    IncidentError,
    Incidents,
    IncidentWriter,
    Moment,
    RandomState,
    list_incidents,
    read_incident,
)
from lightning_gradguard.incidents.files import hidden_name
from tests.incidents.test_format import written

CHECKOUT = Path(__file__).resolve().parents[2]
KILLS = 25

# Each incident has another content, so that a mixture of two would not add up. From a process that
# has imported everything, writers start at once.
LOOP = """
import os, sys, pathlib, torch
from torch import nn
from lightning_gradguard.incidents import IncidentWriter, Incidents, Moment, RandomState
def write(folder):
    writer = IncidentWriter(folder, Incidents(max_count=3))
    for step in range(10**6):
        batch = torch.full((500, 20), float(step))
        model = nn.Linear(200, 50)
        with torch.no_grad():
            model.weight.fill_(step)
        moment = Moment(batch, 0, RandomState.now(torch.device("cpu")))
        writer.begin(step, model, moment).commit("non_finite")

print("ready", flush=True)
for _ in sys.stdin:
    writer = os.fork()
    if writer == 0:
        write(pathlib.Path(sys.argv[1]))
    print(writer, flush=True)
    os.waitpid(writer, 0)
    print("gone", flush=True)
"""


def check_all(folder: Path) -> int:
    """Every incident that is listed is whole, and of one step; returns how many there are."""
    paths = list_incidents(folder)
    for path in paths:
        incident = read_incident(path)
        assert torch.equal(incident.batch(), torch.full((500, 20), float(incident.step)))
        assert incident.weights()["weight"].eq(incident.step).all()
    return len(paths)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_writer_killed_at_any_point_leaves_whole_incidents_only(tmp_path: Path) -> None:
    generator = random.Random(1)
    interrupted = 0
    with subprocess.Popen(
        [sys.executable, "-c", LOOP, str(tmp_path)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        for _ in range(KILLS):
            print("go", file=parent.stdin, flush=True)
            writer = int(parent.stdout.readline())
            time.sleep(generator.uniform(0.005, 0.12))
            os.kill(writer, signal.SIGKILL)
            assert parent.stdout.readline() == "gone\n"
            interrupted += inspect(tmp_path)
    assert interrupted >= 3  # or the test would show nothing
    written(tmp_path, 10**7)
    assert not hidden_in(tmp_path)


def hidden_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def inspect(folder: Path) -> bool:
    """Look at what a killed writer has left; returns whether it was in the middle of something."""
    hidden = hidden_in(folder)
    assert len(hidden) <= 2  # of this writer only: it has removed those of the one before
    assert check_all(folder) <= 3
    return bool(hidden)


def json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file())


def test_a_changed_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "incidents")
    generator = random.Random(2)
    for file in files_of(path):
        if not file.stat().st_size:
            continue
        whole = file.read_bytes()
        for place in [0, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(20))]:
            broken = bytearray(whole)
            broken[place] ^= 1
            file.write_bytes(broken)
            if file.name == "incident.json" and json_of(broken) == json_of(whole):
                continue  # another space between two entries
            with pytest.raises(IncidentError, match="is not what was written"):
                read_incident(path)
        file.write_bytes(whole)
    assert read_incident(path).step == 7


@pytest.mark.parametrize("name", ["tensors.pt", "weights.pt", "history.jsonl", "incident.json"])
def test_a_file_that_is_missing_or_cut_short_is_noticed(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "incidents", 7)
    file = path / name
    if file.stat().st_size:
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(IncidentError, match=f"{name} is not what was written"):
            read_incident(path)
    file.unlink()
    with pytest.raises(IncidentError, match=f"{name}"):
        read_incident(path)


def test_what_is_no_incident_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(IncidentError, match=r"is not an incident: it has no incident\.json"):
        read_incident(tmp_path)
    (tmp_path / "incident.json").write_text('{"step": 3}')
    with pytest.raises(IncidentError, match="is not whole"):
        read_incident(tmp_path)


def test_others_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    other = tmp_path / hidden_name("writing", "3").replace("@", "@elsewhere-")
    other.mkdir()
    for step in range(4):
        written(tmp_path, step, settings=Incidents(max_count=1))
    assert {p.name for p in tmp_path.iterdir()} == {"12", "notes.txt", other.name, "3"}


def test_a_draft_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    writer = IncidentWriter(tmp_path)
    moment = Moment(1, 0, RandomState.now(torch.device("cpu")))
    draft = writer.begin(1, nn.Linear(3, 1), moment)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        draft.commit("diverging")
    with pytest.raises(OSError, match="No space left"):
        writer.begin(2, nn.Linear(3, 1), moment)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert written(tmp_path, 3, writer=writer).name == "3"


def test_an_incident_may_be_moved(tmp_path: Path) -> None:
    path = written(tmp_path / "a")
    moved = Path(shutil.move(path, tmp_path / "elsewhere"))
    assert read_incident(moved).batch().shape == (2, 3)
