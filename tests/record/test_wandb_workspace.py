from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lightning_gradguard.diagnose import Pathology
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.metrics import layer_metrics, step_metrics, time_metrics
from lightning_gradguard.record.wandb_record.axes import STEP, action_key, found_key
from lightning_gradguard.record.wandb_workspace import save_workspace, workspace, workspace_json
from lightning_gradguard.respond.actions import ActionKind

pytest.importorskip("wandb_workspaces")

# Written anew by: gradguard dashboard --entity team --project demo --dry-run
SNAPSHOT = Path(__file__).with_name("wandb_workspace.json")


def view() -> dict[str, Any]:
    return json.loads(workspace_json("team", "demo"))


def panels(of: str | None = None) -> Iterator[dict[str, Any]]:
    for section in view()["spec"]["section"]["panelBankConfig"]["sections"]:
        if of in (None, section["name"]):
            yield from section["panels"]


def patterns(of: str | None = None) -> list[str]:
    return [p["config"]["metricRegex"] for p in panels(of) if "metricRegex" in p["config"]]


def test_the_workspace_is_the_one_that_was_looked_at():
    assert view() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_it_is_the_same_each_time_and_no_panel_is_another():
    texts = []
    for seed in (1, 2):
        random.seed(seed)
        texts.append(workspace_json("team", "demo"))
    assert texts[0] == texts[1]
    names = [panel["__id__"] for panel in panels()]
    assert len(set(names)) == len(names)


def test_there_is_a_section_for_each_thing_that_people_ask_for():
    names = [s["name"] for s in view()["spec"]["section"]["panelBankConfig"]["sections"]]
    assert names == [
        "Findings",
        "Gradient norms",
        "Through time",
        "Through depth",
        "What the guard did",
    ]


@pytest.mark.parametrize("label", ["", "optimizer1"])
def test_every_metric_of_the_guard_is_on_a_panel(label):
    row = StepRecord(1, 1.0, 1.0, 1.0, 1.0, 1.0, 0, False, 1.0)
    keys = [
        *step_metrics(row, protecting=True, label=label),
        *layer_metrics({"encoder.rnn": 1.0}, label),
        *time_metrics([TimeReading("rnn", "l0", "exact", decay_rate=-0.1, recency=0.1)], label),
        *(action_key(kind, label) for kind in ActionKind),
        *(found_key(pathology, label) for pathology in Pathology),
    ]
    shown = [key for key in keys if any(re.search(pattern, key) for pattern in patterns())]
    left_out = {key.rpartition("/")[2] for key in set(keys) - set(shown)}
    assert left_out == {"max_ratio"}  # of the cap: there is a panel of the tensors it held back


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("train_loss", True),
        ("val/loss_epoch", True),
        ("Loss", True),
        ("gradguard/found/loss_spike", False),
        ("glossary", False),
    ],
)
def test_the_panel_of_the_loss_shows_losses(key, shown):
    (pattern,) = [pattern for pattern in patterns("Gradient norms") if "oss" in pattern]
    assert bool(re.search(pattern, key)) == shown


def test_patterns_are_such_as_every_engine_knows():
    assert all("(?" not in pattern and "\\" not in pattern for pattern in patterns())


def test_lines_are_drawn_over_the_trainers_step():
    lines = [panel for panel in panels() if panel["viewType"] == "Run History Line Plot"]
    assert {panel["config"]["xAxis"] for panel in lines} == {STEP}


@pytest.mark.parametrize("argument", ["entity", "project", "name"])
def test_an_empty_name_is_refused(argument):
    names = {"entity": "team", "project": "demo", "name": "GradGuard", argument: ""}
    with pytest.raises(ValueError, match=f"{argument} must be a name, got ''"):
        workspace(**names)


@pytest.mark.parametrize("missing", ["wandb_workspaces.workspaces", "wandb_workspaces.reports.v2"])
def test_without_the_extra_it_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ImportError, match=re.escape("pip install 'lightning-gradguard[dashboard]'")
    ):
        workspace_json("team", "demo")


# -- saving, to a server that stands in for W&B's --------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        name = (asked.get("variables") or {}).get("name", "")
        view = {"id": "VmlldzoxMjM=", "name": name}
        data = {"upsertView": {"view": view, "inserted": True}, "viewer": {"entity": "team"}}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_saving_sends_the_same_workspace_and_returns_its_address(tmp_path, monkeypatch):
    import wandb

    server = HTTPServer(("127.0.0.1", 0), Answers)
    server.asked = []
    thread = Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    try:
        url = save_workspace("team", "demo")
    finally:
        wandb.teardown()
        server.shutdown()
        thread.join()
        server.server_close()
    (sent,) = [asked for asked in server.asked if "upsertView" in asked["query"]]
    assert json.loads(sent["variables"]["spec"]) == view()["spec"]
    assert (sent["variables"]["entityName"], sent["variables"]["projectName"]) == ("team", "demo")
    name = re.fullmatch("nw-(.+)-v", sent["variables"]["name"])
    assert name is not None
    assert url == f"{address}/team/demo?nw={name[1]}"
