from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.record import Recorder
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory, RunInfo
from lightning_gradguard.record.wandb_record import WandbRecord
from lightning_gradguard.record.wandb_record.axes import STEP, define_axes, found_key, summaries
from lightning_gradguard.record.wandb_record.media import MAX_BINS, MAX_PICTURES, pooled
from lightning_gradguard.record.wandb_record.staircase import Staircase
from lightning_gradguard.record.wandb_record.tables import (
    FINDING_COLUMNS,
    MAX_ROWS,
    action_rows,
    finding_rows,
    with_finding,
)
from lightning_gradguard.respond.actions import Action, ActionKind
from tests.models import Regression, loader, make_batches, quiet_trainer
from tests.record.runs import VANISHING, made_up_run
from tests.record.wandb_log import WandbLog, finished, offline, read_log

RUN = made_up_run(400, 6)
PART = RUN.optimizers[0]
SPIKE = PART.findings[1]
SKIP, BACK_OFF = PART.actions
OPEN_SPIKE = replace(SPIKE, until=None)
PAGE = "<!doctype html><title>GradGuard</title><p>ünicode &lt;script&gt;"
PICTURES = {
    "grad_norm/heat_map": np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3),
    "grad_time/encoder.rnn/heat_map": np.full((6, 8, 3), 7, np.uint8),
    "grad_time/decoder.rnn/heat_map": np.full((6, 8, 3), 9, np.uint8),
}
FOUND_EXPLODING = "gradguard/found/exploding"


# -- lines that show when something happened ------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=20))
def test_joined_points_of_a_staircase_are_the_level_at_every_time(moves):
    staircase, points, at, levels = Staircase(), [], 0, {}
    for gap, level in moves:
        at += gap
        before = staircase.jump({"x": float(level)})
        points += [(at, level) for level in before.values()] + [(at, float(level))]
        levels[at] = float(level)
    now, steps = 0.0, [step for step, _ in points]
    for step in range(1, at + 1):
        joined = np.interp(step - 0.5, steps, [level for _, level in points])
        if step > steps[0]:
            assert joined == now
        now = levels.get(step, now)


@pytest.mark.parametrize(
    ("summary", "level"),
    [(None, 0.0), (3, 3.0), ({"max": 4}, 4.0), ({"max": 4, "last": 2}, 2.0), ("NaN", 0.0)],
)
def test_a_resumed_run_goes_on_from_the_level_that_its_summary_has(summary, level):
    staircase = Staircase({"x": summary}.get)
    assert staircase.level("x") == level
    assert staircase.jump({"x": level + 1}) == {"x": level}
    assert staircase.level("x") == level + 1


# -- tables ---------------------------------------------------------------------------------------


def finding(
    pathology: Pathology, where: str, severity: Severity, step: int, heals: bool
) -> Finding:
    until = step if heals else None
    return Finding(pathology, severity, where, step, {}, "Something.", until=until)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([Pathology.EXPLODING, Pathology.DEAD_UNITS]),
            st.sampled_from(["a", "b"]),
            st.sampled_from(Severity),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_findings_grow_without_duplicates_as_in_the_guards_own_record(drawn):
    recorder, found = Recorder(silent=True), []
    for step, (pathology, where, severity, heals) in enumerate(drawn):
        event = finding(pathology, where, severity, step, heals)
        recorder.finding(event)
        found = with_finding(found, event)
    assert sorted(map(repr, found)) == sorted(map(repr, recorder.findings))


def test_a_finding_is_one_row_with_its_remedy_and_the_open_and_severe_come_first():
    rows = finding_rows({"": [replace(SPIKE, step=1), VANISHING, replace(OPEN_SPIKE, step=300)]})
    table = [dict(zip(FINDING_COLUMNS, row, strict=True)) for row in rows]
    assert [row["step"] for row in table] == [300, 120, 1]
    assert table[1] == {
        "pathology": "vanishing_in_time",
        "severity": "warning",
        "certainty": "likely",
        "where": "encoder.rnn",
        "step": 120,
        "since": 90,
        "until": None,
        "message": "The gradient vanishes through time in encoder.rnn: it halves every 1.6 steps, "
        "the sequence has 200.",
        "remedy": "Use an LSTM.",
        "code": "self.rnn = nn.LSTM(64, 128)",
        "optimizer": "",
    }
    assert table[2]["until"] == SPIKE.until


def test_tables_are_bounded_and_keep_what_matters():
    noted = replace(VANISHING, severity=Severity.INFO)
    rows = finding_rows({"": [replace(noted, step=n) for n in range(2 * MAX_ROWS)] + [SPIKE]})
    assert len(rows) == MAX_ROWS
    rows = action_rows({"a": [replace(SKIP, step=n) for n in range(2 * MAX_ROWS)]})
    assert (len(rows), rows[0][0], rows[0][3]) == (MAX_ROWS, 2 * MAX_ROWS - 1, "a")


# -- histograms -----------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=3000))
def test_pooled_histograms_keep_the_total_norm_and_fit(norms):
    weights, edges = pooled(np.array(norms), np.arange(len(norms) + 1.0))
    assert len(weights) == min(len(norms), MAX_BINS) == len(edges) - 1
    assert (edges[0], edges[-1]) == (0.0, len(norms))
    assert (np.diff(edges) > 0).all()
    assert np.linalg.norm(weights) == pytest.approx(np.linalg.norm(norms))


def test_what_is_not_finite_weighs_nothing():
    weights, _ = pooled(np.array([1.0, np.nan, np.inf]), np.arange(4.0))
    assert weights.tolist() == [1.0, 0.0, 0.0]


# -- metrics --------------------------------------------------------------------------------------


def test_metric_definitions_stay_few_and_name_each_optimizer():
    keys = dict(summaries(["optimizer0", "optimizer1"]))
    assert len(keys) < 100
    assert keys["grad_norm/optimizer1/total"] == "max,last"
    assert keys[found_key(Pathology.EXPLODING, "optimizer0")] == "max,last"


def test_no_pattern_has_a_summary_as_another_may_match_first():
    class Definitions:
        def __init__(self) -> None:
            self.summaries: dict[str, Any] = {}

        def define_metric(self, name: str, **options: Any) -> None:
            assert name not in self.summaries
            assert options.get("step_metric") == (None if name == STEP else STEP)
            self.summaries[name] = options.get("summary")

    run = Definitions()
    define_axes(run, [""])
    assert {name for name in run.summaries if name.endswith("*")} >= {"grad_norm/*", "gradguard/*"}
    assert all(run.summaries[name] is None for name in run.summaries if name.endswith("*"))


# -- a whole run, from W&B's own file -------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbLog]:
    root = tmp_path_factory.mktemp("run")
    report = root / "report.html"
    report.write_text(PAGE, encoding="utf-8")
    with offline(root) as wandb:
        run = wandb.init(project="demo", id="one")
        record = WandbRecord(run)
        record.start(RUN.info)
        for at, norm in enumerate((3.0, 9.0, 1.0)):
            run.log({"grad_norm/total": norm, "gradguard/lr_scale": 1.0 / norm, STEP: at})
        record.event(120, VANISHING)
        record.show(150, replace(PART, findings=(VANISHING,), actions=()), PICTURES)
        record.show(160, replace(PART, findings=(VANISHING,), actions=()))  # nothing new
        record.event(200, OPEN_SPIKE)
        record.event(200, SKIP)
        record.event(230, replace(SKIP, step=230))
        record.show(300, replace(PART, actions=(SKIP, replace(SKIP, step=230))))
        record.finish(399, RUN, report)
        run.alert(title="told", text="as well", level="WARN", wait_duration=0)
        yield read_log(finished(wandb, root))


@pytest.mark.slow
def test_the_settings_are_in_the_configuration(log):
    assert log.config["gradguard"]["mode"] == "protect"
    assert log.config["gradguard"]["versions"] == RUN.info.versions


@pytest.mark.slow
def test_metrics_are_defined_on_the_trainers_step(log):
    assert log.metrics[STEP].step_metric == ""
    for name in ("grad_norm/*", "grad_time/*", "update_ratio/*", "gradguard/*", "grad_norm/total"):
        assert log.metrics[name].step_metric == STEP
        assert log.metrics[name].options.step_sync
    total = log.metrics["grad_norm/total"].summary
    assert (total.max, total.last, total.min) == (True, True, False)
    assert log.metrics["gradguard/skipped_steps"].summary.max
    assert log.metrics["gradguard/clip_coef"].summary.min
    assert not log.metrics["grad_norm/*"].HasField("summary")


@pytest.mark.slow
def test_the_summary_keeps_the_worst_and_the_last(log):
    assert log.summary["grad_norm/total"] == {"max": 9, "last": 1}
    assert log.summary["gradguard/lr_scale"] == {"min": pytest.approx(1 / 9), "last": 1}
    assert log.summary["gradguard/actions/skip"] == {"max": 2}
    assert log.summary["gradguard/severity"] == "warning"
    assert log.summary["gradguard/open_findings"] == 1
    assert log.summary["gradguard/verdict"].startswith("2 findings (1 critical, 1 warning; 1 heal")


@pytest.mark.slow
def test_actions_and_findings_are_upright_jumps_at_their_steps(log):
    assert log.column("gradguard/actions/skip") == [
        (200, 0),
        (200, 1),
        (230, 1),
        (230, 2),
        (399, 2),
    ]
    exploding = log.column(FOUND_EXPLODING)
    assert exploding[:2] == [(200, 0), (200, Severity.CRITICAL)]
    assert exploding[2:] == [(300, Severity.CRITICAL), (300, 0), (399, 0)]  # healed by then
    vanishing = log.column("gradguard/found/vanishing_in_time")
    assert vanishing[:2] == [(120, 0), (120, Severity.WARNING)]
    assert vanishing[-1] == (399, Severity.WARNING)


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.slow
def test_pictures_are_stored_as_they_are_by_what_they_show(log):
    stored = {}
    for key in ("grad_maps/grad_norm", "grad_maps/grad_time"):
        ((step, shown),) = log.column(key)
        assert step == 150
        for caption, name in zip(shown["captions"], shown["filenames"], strict=True):
            stored[caption] = pixels(log.file(name))
    assert list(stored) == [f"{name}, step 150" for name in PICTURES]
    for picture, drawn in zip(stored.values(), PICTURES.values(), strict=True):
        assert np.array_equal(picture, drawn)


@pytest.mark.slow
def test_histograms_weigh_layers_and_timesteps_by_their_norms(log):
    layers = log.column("grad_histograms/layers")
    assert [step for step, _ in layers] == [150, 160, 300]
    assert layers[0][1]["_type"] == "histogram"
    assert layers[0][1]["values"] == pytest.approx(PART.layers.values[-1].tolist())
    assert layers[0][1]["bins"] == list(range(7))
    time = log.column("grad_histograms/time/encoder.rnn/l0")[0][1]
    assert time["values"] == pytest.approx(list(PART.latest_times[0].profile))
    assert (time["bins"][0], time["bins"][-1]) == (0, 200)


@pytest.mark.slow
def test_the_findings_table_changes_its_rows_and_is_logged_only_then(log):
    tables = log.column("gradguard/findings_table")
    assert [step for step, _ in tables] == [150, 300]
    first, last = (
        json.loads(log.file(table["path"]).read_text(encoding="utf-8")) for _, table in tables
    )
    assert first["columns"] == list(FINDING_COLUMNS)
    assert [row[0] for row in first["data"]] == ["vanishing_in_time"]
    assert [(row[0], row[6]) for row in last["data"]] == [
        ("vanishing_in_time", None),
        ("exploding", SPIKE.until),
    ]
    assert log.summary["gradguard/findings_table"]["nrows"] == 2
    names = {artifact.name for artifact in log.artifacts if artifact.type == "run_table"}
    assert len(names) == 2  # each table is versions of one artifact


@pytest.mark.slow
def test_the_actions_table_tells_what_was_done(log):
    table = json.loads(log.file(log.summary["gradguard/actions_table"]["path"]).read_text())
    assert table["data"] == [
        [201, "back_off", BACK_OFF.message, ""],
        [200, "skip", SKIP.message, ""],
    ]


@pytest.mark.slow
def test_the_report_is_a_panel_byte_for_byte_and_an_artifact(log):
    ((step, page),) = log.column("gradguard/report")
    assert (step, page["_type"]) == (399, "html-file")
    assert log.file(page["path"]).read_text(encoding="utf-8") == PAGE
    (artifact,) = [artifact for artifact in log.artifacts if artifact.type == "report"]
    assert artifact.name == "gradguard-report-one"
    assert [entry.path for entry in artifact.manifest.contents] == ["report.html"]


@pytest.mark.slow
def test_every_row_has_its_step_and_alerts_are_beside_them(log):
    assert all(STEP in row for row in log.history)
    assert log.alerts == [("told", "as well", "WARN")]


# -- several runs, sweeps, resumed runs -----------------------------------------------------------


@pytest.mark.slow
def test_two_runs_at_once_a_sweep_and_a_resumed_one_are_kept_apart(tmp_path):
    with offline(tmp_path) as wandb:
        runs = [
            wandb.init(project="demo", id=name, resume="allow", reinit="create_new")
            for name in ("swept", "plain")
        ]
        # as the agent of a sweep sets what it has chosen
        runs[0].config.update_locked(
            {"gradguard": {"GradGuard": {"mode": "observe"}}}, user="sweep"
        )
        info = RunInfo(settings={"GradGuard": {"mode": "protect", "clip": float("inf")}})
        for number, run in enumerate(runs):
            record = WandbRecord(run)
            record.start(info)
            record.event(5 + number, SKIP)
            record.finish(9, RunHistory(info, (PART,) if number else ()))
        # the same run once more, as by a second fit
        record = WandbRecord(runs[1])
        record.start(replace(info, settings={"GradGuard": {"mode": "observe"}}))
        record.event(20, SKIP)
        for run in runs:
            run.finish()
        wandb.teardown()
        swept, plain = (
            read_log(next(tmp_path.glob(f"wandb/*/run-{name}.wandb")))
            for name in ("swept", "plain")
        )
    assert swept.config["gradguard"] == {"GradGuard": {"mode": "observe"}}
    assert swept.column("gradguard/actions/skip") == [(5, 0), (5, 1), (9, 1)]
    assert plain.column("gradguard/actions/skip") == [
        (6, 0),
        (6, 1),
        (9, 1),
        (20, 1),
        (20, 2),
    ]
    assert plain.config["gradguard"] == {"GradGuard": {"mode": "observe"}, "versions": {}}
    assert "gradguard/findings_table" in plain.summary
    assert "gradguard/findings_table" not in swept.summary


@pytest.mark.slow
def test_a_run_that_someone_has_finished_raises(tmp_path):
    with offline(tmp_path) as wandb:
        run = wandb.init(project="demo")
        record = WandbRecord(run)
        record.start(RUN.info)
        wandb.finish()
        for call in (
            lambda: record.event(1, SKIP),
            lambda: record.show(1, PART),
            lambda: record.finish(1, RUN),
            lambda: record.start(RUN.info),
        ):
            with pytest.raises(wandb.errors.UsageError, match="is finished"):
                call()


def test_a_disabled_run_takes_everything_and_keeps_nothing(tmp_path):
    wandb = pytest.importorskip("wandb")
    report = tmp_path / "report.html"
    report.write_text(PAGE, encoding="utf-8")
    record = WandbRecord(wandb.init(mode="disabled", dir=tmp_path))
    record.start(RUN.info)
    record.event(3, SKIP)
    record.show(5, PART, PICTURES)
    record.finish(9, RUN, report)
    wandb.finish()
    assert list(tmp_path.iterdir()) == [report]


# -- bounds ---------------------------------------------------------------------------------------


class Written:
    """Stands in for a run, to see what one call logs."""

    id = "a run/with:odd characters" + "x" * 200

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        self.rows.append(values)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)


def test_a_large_model_writes_a_bounded_number_of_media():
    pytest.importorskip("wandb")
    modules = [replace(PART.times[0], module=f"rnn{number}") for number in range(30)]
    large = replace(made_up_run(20, 1000).optimizers[0], times=tuple(modules), label="optimizer0")
    pictures = {f"grad_time/rnn{n}/heat_map": PICTURES["grad_norm/heat_map"] for n in range(30)}
    run = Written()
    WandbRecord(run).show(5, large, pictures)
    values = run.rows[-1]
    assert len(values["grad_maps/optimizer0/grad_time"]) == MAX_PICTURES
    histograms = [key for key in values if key.startswith("grad_histograms/optimizer0/")]
    assert len(histograms) == MAX_PICTURES + 1
    assert len(values["grad_histograms/optimizer0/layers"].histogram) == MAX_BINS


def test_an_empty_history_logs_nothing():
    pytest.importorskip("wandb")
    run = Written()
    WandbRecord(run).show(0, OptimizerHistory())
    WandbRecord(run).finish(0, RunHistory())
    assert run.rows == []


def test_the_artifact_gets_a_name_that_is_allowed_whatever_the_run_is_called(tmp_path):
    pytest.importorskip("wandb")
    report = tmp_path / "report.html"
    report.write_text(PAGE, encoding="utf-8")
    run = Written()
    WandbRecord(run).finish(1, RUN, report)
    assert run.artifacts[0].name.startswith("gradguard-report-a-run-with-odd-characters")


def test_one_pathology_in_two_places_is_as_bad_as_the_worse():
    run = Written()
    record = WandbRecord(run)
    record.event(1, replace(OPEN_SPIKE, where="a", severity=Severity.CRITICAL))
    record.event(2, replace(OPEN_SPIKE, where="b", severity=Severity.INFO))
    assert [(row[STEP], row[FOUND_EXPLODING]) for row in run.rows] == [(1, 0), (1, 30), (2, 30)]


# -- beside Lightning's logger --------------------------------------------------------------------


class Recording(Callback):
    """Marks an action at one step, and logs through Lightning at all of them."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer, pl_module):
        self.record = WandbRecord(trainer.logger.experiment)
        self.record.start(RUN.info)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("grad_norm/total", float(batch_idx))
        if batch_idx == self.step:
            self.record.event(batch_idx, Action(ActionKind.SKIP, batch_idx, "Step dropped."))


@pytest.mark.slow
def test_events_stand_at_the_steps_of_lightnings_logger(tmp_path: Path):
    with offline(tmp_path) as wandb:
        from lightning.pytorch.loggers import WandbLogger

        logger = WandbLogger(offline=True, save_dir=tmp_path)
        trainer = quiet_trainer(tmp_path, Recording(3), logger=logger, log_every_n_steps=1)
        trainer.fit(Regression(), loader(make_batches(6)))
        log = read_log(finished(wandb, tmp_path))
    assert log.column("grad_norm/total") == [(step, step) for step in range(6)]
    assert log.column("gradguard/actions/skip") == [(3, 0), (3, 1)]
    assert log.metrics["*"].step_metric == STEP  # Lightning's own
    assert log.summary["grad_norm/total"] == {"max": 5, "last": 5}
