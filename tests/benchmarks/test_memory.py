"""The memory benchmark: its tasks, its runs, its arithmetic, its page, its command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import main
from benchmarks.memory.aims import AIMS, aims
from benchmarks.memory.command import estimate
from benchmarks.memory.correlation import interval, ranks, spearman
from benchmarks.memory.document import DOCUMENT, page
from benchmarks.memory.models import MODELS, select
from benchmarks.memory.results import compact, value_in_words, verdict, write_json
from benchmarks.memory.runner import Job, Result, run_job, train
from benchmarks.memory.scoring import score
from benchmarks.memory.spans import Span, measure_span, slowest
from benchmarks.memory.tasks import QUICK, WORKLOADS, workload_named
from benchmarks.overhead.results import RESULTS
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.tasks import AddingProblem, TemporalOrder

NAMES = tuple(model.name for model in MODELS)


def span(horizon: float) -> dict:
    rate = -math.log(1000) / horizon
    return Span(rate, 0.01, math.log(2) / -rate, horizon, "rnn/l0", "").to_dict()


def result_of(value: float, solved_at: int = 0, before: float = 10.0, after: float = 10.0, **other):
    given = {
        "value": value,
        "validation": value,
        "solved_at": solved_at,
        "steps": solved_at or 2000,
        "budget": 2000,
        "seconds": 1.5,
        "parameters": 1234,
        "before": span(before),
        "after": span(after),
        "updates": None,
    }
    return Result(**{**given, **other})


# -- tasks ----------------------------------------------------------------------------------------


def test_targets_are_the_published_ones():
    targets = {workload.name: (workload.metric, workload.target) for workload in WORKLOADS}
    assert targets == {
        "adding_50": ("MSE", 1.67e-3),
        "adding_200": ("MSE", 1e-3),
        "copy_100": ("cross entropy", pytest.approx(0.1 * 10 * math.log(8) / 120)),
        "order_100": ("accuracy", 0.99),
        "frequency_100": ("accuracy", 0.99),
    }
    lengths = [workload.timesteps for workload in WORKLOADS]
    assert lengths == [50, 200, 120, 100, 100]


def test_knowing_nothing_costs_what_the_task_says():
    costs = {workload.name: workload.nothing for workload in WORKLOADS}
    assert costs == pytest.approx(
        {
            "adding_50": 1 / 6,
            "adding_200": 1 / 6,
            "copy_100": 10 * math.log(8) / 120,
            "order_100": 0.25,
            "frequency_100": 0.5,
        }
    )


def test_the_adding_problem_of_campos_has_its_markers_and_values():
    task = workload_named("adding_50").task(0)
    assert isinstance(task, AddingProblem)
    assert (task.variant, task.low, task.high) == ("first_tenth", -0.5, 0.5)


@pytest.mark.parametrize("workload", [*WORKLOADS, *QUICK], ids=lambda workload: workload.name)
def test_every_workload_is_tried_by_known_models_and_has_simple_ones(workload):
    assert set(workload.models) <= set(NAMES)
    assert len(set(workload.models)) == len(workload.models)
    assert {"tanh RNN", "LSTM", "GRU"} <= set(workload.models)


@pytest.mark.parametrize("name", ["adding_50", "order_100"])
def test_progress_is_0_without_memory_and_1_at_the_target_and_beyond(name):
    workload = workload_named(name)
    ends = (workload.nothing, workload.target)
    assert [workload.progress(value) for value in ends] == [0.0, 1.0]
    assert workload.progress(sum(ends) / 2) == pytest.approx(0.5)
    better = 0.0 if workload.metric == "MSE" else 1.0
    assert (workload.progress(better), workload.solved(better)) == (1.0, True)
    assert (workload.progress(math.nan), workload.solved(math.nan)) == (0.0, False)
    assert workload.progress(2 * ends[0] - ends[1]) == 0.0


def test_a_seed_decides_the_batches_and_no_sequence_comes_twice():
    workload = workload_named("adding_20")
    first, again, other = (workload.batches(seed) for seed in (0, 0, 1))
    drawn = [next(first) for _ in range(60)]  # more than are made at a time
    assert all(torch.equal(inputs, next(again)[0]) for inputs, _ in drawn)
    assert not torch.equal(drawn[0][0], next(other)[0])
    held_out = [workload.task(0).split(name).batch()[0] for name in ("val", "test")]
    every = torch.cat([*(inputs for inputs, _ in drawn), *held_out])
    assert len(every.unique(dim=0)) == len(every)


# -- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def easy():
    """Ten steps, so that every model has learned something after a second."""
    workload = workload_named("order_20")
    return replace(workload, name="order_10", make=lambda **sizes: TemporalOrder(10, **sizes))


@pytest.mark.parametrize("name", NAMES)
def test_every_model_learns_something_and_its_row_has_all_numbers(easy, name):
    (model,) = select([name])
    made = train(easy, model, 3e-3, seed=0, steps=100)
    assert made.value > easy.nothing + 0.15
    assert 0 < made.steps <= made.budget == 100
    assert made.parameters > 1000
    assert made.seconds > 0.0
    for when in (made.before, made.after):
        numbers = {when[key] for key in ("rate", "half_life", "horizon")}
        assert all(math.isfinite(number) for number in numbers)
        assert when["horizon"] == pytest.approx(math.log(1000) / abs(when["rate"]))
        assert when["half_life"] == pytest.approx(math.log(2) / abs(when["rate"]))
    assert made.before != made.after
    assert (made.updates is not None) == name.startswith("Skip")


def test_a_run_ends_when_its_task_is_solved_but_not_one_that_skips(easy):
    generous = replace(easy, target=0.0)
    plain, skipping = (
        train(generous, select([name])[0], 1e-3, seed=0, steps=200) for name in ("GRU", "SkipGRU")
    )
    assert (plain.solved_at, plain.steps) == (100, 100)
    assert (skipping.solved_at, skipping.steps) == (100, 200)
    assert 0.0 < skipping.updates <= 1.0


def test_a_run_repeats_exactly():
    job = Job("adding_20", "SkipLSTM", 3e-3, 1, steps=5)
    first, second = run_job(job), run_job(job)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


def test_weights_that_are_not_finite_end_a_run_and_count_as_nothing(easy):
    made = train(easy, select(["IRNN"])[0], 1e20, seed=0, steps=300)
    assert made.steps == 100
    assert math.isnan(made.value)
    assert made.solved_at == 0
    assert math.isnan(made.after["rate"])
    assert made.after["note"]


def test_the_update_cost_reaches_the_gates(easy):
    (model,) = select(["SkipGRU"])
    shares = [
        train(replace(easy, update_cost=cost), model, 1e-2, seed=0, steps=100).updates
        for cost in (0.0, 1.0)
    ]
    assert shares[1] < shares[0] - 0.2


def test_a_measurement_leaves_no_gradient_and_no_hook():
    task = workload_named("adding_20").task(0)
    reader = select(["GRU"])[0].make(task)
    measure_span(reader, task)
    assert all(parameter.grad is None for parameter in reader.parameters())
    assert not reader.rnn._forward_hooks


def test_the_slowest_layer_is_the_one_with_the_longest_horizon():
    rates = {"a": -0.5, "b": 0.01, "c": -0.2, "d": math.nan}
    readings = [
        TimeReading(name, "l0", "exact", decay_rate=rate, note="why" * math.isnan(rate))
        for name, rate in rates.items()
    ]
    whole = TimeReading("e", "", "input", decay_rate=-1e-9)
    chosen = slowest([*readings, whole])
    assert (chosen.part, chosen.rate) == ("b/l0", 0.01)
    assert chosen.note == "d/l0: why"
    assert math.isnan(slowest([whole]).horizon)


def test_the_estimate_is_of_whole_budgets():
    jobs = [Job("adding_20", "tanh RNN", 1e-3, seed) for seed in range(3)]
    assert estimate(jobs) > 0.0
    assert estimate([]) == 0.0


# -- correlations ---------------------------------------------------------------------------------


def test_ranks_and_correlations_of_known_values():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 9.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert ranks(torch.tensor([1.0, math.inf, 2.0])).tolist() == [1.0, 3.0, 2.0]
    # Hours of television against intelligence, the example of Wikipedia.
    iq = [106.0, 100.0, 86.0, 101.0, 99.0, 103.0, 97.0, 113.0, 112.0, 110.0]
    tv = [7.0, 27.0, 2.0, 50.0, 28.0, 29.0, 20.0, 12.0, 6.0, 17.0]
    assert spearman(iq, tv) == pytest.approx(-29 / 165)
    # With ties: Pearson's of (1.5, 1.5, 3) and (1, 2, 3).
    assert spearman([0.0, 0.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(spearman([1.0, 1.0], [1.0, 2.0]))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12, unique=True), st.randoms())
def test_only_the_order_matters(values, random):
    others = list(values)
    random.shuffle(others)
    rho = spearman(values, others)
    assert -1.0 - 1e-12 <= rho <= 1.0 + 1e-12
    grown = [math.copysign(abs(value) ** (1 / 3), value) for value in others]
    if len(set(grown)) == len(grown):
        assert spearman(values, grown) == pytest.approx(rho)
    assert spearman(values, [-value for value in others]) == pytest.approx(-rho)
    assert spearman(values, values) == pytest.approx(1.0)


def test_an_interval_holds_the_value_and_is_wider_where_groups_are_fewer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, generator=generator)
    y = x + torch.randn(60, generator=generator)
    first, second = x.tolist(), y.tolist()
    alone = interval(first, second, range(60))
    # Twenty pairs, each three times: no more evidence than twenty.
    thrice = interval(first[:20] * 3, second[:20] * 3, list(range(20)) * 3)
    assert alone[0] < spearman(first, second) < alone[1]
    assert thrice[0] < spearman(first[:20], second[:20]) < thrice[1]
    assert thrice[1] - thrice[0] > 1.3 * (alone[1] - alone[0])
    assert all(math.isnan(end) for end in interval([1.0, 2.0], [1.0, 2.0], ["a", "b"]))


# -- rows -----------------------------------------------------------------------------------------


def runs_of(values: dict[str, list[float]], horizons: dict[str, float], task: str = "adding_50"):
    """Results of one task by model and rate; two seeds; solved after 400 steps."""
    runs = {}
    for name, by_rate in values.items():
        for lr, value in zip((1e-3, 3e-3), by_rate, strict=True):
            for seed in range(2):
                solved_at = 400 if workload_named(task).solved(value) else 0
                found = result_of(value, solved_at, horizons[name], 2 * horizons[name])
                runs[Job(task, name, lr, seed)] = found
    return runs


SCORES = {"tanh RNN": [0.16, 0.15], "LSTM": [0.001, 0.1], "GRU": [0.05, 0.04]}
HORIZONS = {"tanh RNN": 10.0, "LSTM": 100.0, "GRU": 40.0}


def test_rows_are_of_the_best_rate_and_correlations_of_all_runs():
    tables = score(runs_of(SCORES, HORIZONS))
    rows = {row["model"]: row for row in tables["rows"]}
    assert {name: row["lr"] for name, row in rows.items()} == {
        "tanh RNN": 3e-3,
        "LSTM": 1e-3,
        "GRU": 3e-3,
    }
    assert [rows["LSTM"][key] for key in ("value", "solved", "seeds")] == [0.001, 2, 2]
    assert rows["GRU"]["progress"] == pytest.approx((1 / 6 - 0.04) / (1 / 6 - 1.67e-3))
    assert rows["LSTM"]["before"]["horizon"] == pytest.approx(100.0)
    assert rows["LSTM"]["before"]["half_life"] == pytest.approx(100 * math.log(2) / math.log(1000))
    assert rows["LSTM"]["after"]["horizon"] == pytest.approx(200.0)
    assert rows["LSTM"]["seconds_at_all_rates"] == pytest.approx(6.0)
    found = {(c["runs"], c["outcome"], c["when"]): c for c in tables["correlations"]}
    best = found["best rates", "progress", "before"]
    assert (best["rho"], best["count"], best["groups"]) == (pytest.approx(1.0), 6, 3)
    assert found["all rates", "progress", "before"]["count"] == 12
    assert found["all rates", "progress", "before"]["rho"] < 1.0
    assert tables["by_horizon"][0]["before"] == {"runs": 2, "solved": 0}  # 10 of 50 steps
    assert tables["by_horizon"][-1]["before"] == {"runs": 2, "solved": 2}  # 100 of 50


def test_of_rates_that_learn_nothing_the_least_bad_one_is_shown():
    runs = runs_of({"LSTM": [math.nan, 0.17], "GRU": [0.18, 0.17]}, HORIZONS)
    assert [row["lr"] for row in score(runs)["rows"]] == [3e-3, 3e-3]
    assert {row["progress"] for row in score(runs)["rows"]} == {0.0}


def test_tasks_that_differ_in_difficulty_correlate_nothing_within_them():
    runs = runs_of(SCORES, dict.fromkeys(SCORES, 10.0))
    easy = {name: [0.001, 0.001] for name in SCORES}
    runs |= runs_of(easy, dict.fromkeys(SCORES, 900.0), "adding_200")
    (first, *_) = score(runs)["correlations"]
    assert first["rho"] > 0.5
    assert math.isnan(first["rho_within"])


def test_a_run_without_a_rate_is_counted_and_left_out():
    runs = runs_of(SCORES, HORIZONS)
    lost = next(job for job in runs if job.model == "LSTM" and job.lr == 1e-3)
    nothing = Span(math.nan, math.nan, math.nan, math.nan, "", "no gradient").to_dict()
    runs[lost] = replace(runs[lost], before=nothing)
    tables = score(runs)
    (first, *_) = tables["correlations"]
    assert (first["count"], first["unmeasured"]) == (5, 1)
    row = next(row for row in tables["rows"] if row["model"] == "LSTM")
    assert row["before"]["horizon"] == pytest.approx(100.0)  # of the other seed
    assert row["before"]["notes"] == ["no gradient"]


def test_a_run_that_is_not_finite_is_the_worst():
    middle = {}
    for values in ((0.2, math.nan, 0.1), (math.nan, 0.1, math.nan)):
        runs = {job: result_of(v) for job, v in zip(_three_seeds(), values, strict=True)}
        (row,) = score(runs)["rows"]
        middle[values] = row["value"]
    first, second = middle.values()
    assert first == 0.2
    assert math.isnan(second)


def test_what_was_solved_and_lost_again_is_not_solved():
    jobs = _three_seeds("SkipGRU")
    lost = result_of(0.16, solved_at=400, updates=0.3, steps=2000)
    kept = result_of(0.001, solved_at=900, updates=0.5, steps=2000)
    (row,) = score(dict(zip(jobs, [kept, lost, kept], strict=True)))["rows"]
    assert (row["solved"], row["solved_at"]) == (2, [900, 0, 900])
    assert (row["updates"], row["most_updates"]) == (0.5, 0.5)


def _three_seeds(model: str = "LSTM") -> list[Job]:
    return [Job("adding_50", model, 3e-3, seed) for seed in range(3)]


def test_aims_are_met_only_by_every_model_that_they_name():
    def row(task: str, model: str, **other) -> dict:
        given = {"task": task, "model": model, "value": 0.0, "solved": 3, "seeds": 3}
        return {**given, "most_updates": None, **other}

    rows = [
        row("adding_50", "LSTM", solved=2),
        row("adding_50", "SkipGRU", most_updates=0.5),
        row("adding_50", "SkipLSTM", most_updates=0.7),
        row("adding_200", "tanh RNN", value=0.17, solved=0),
        row("order_100", "GRU", solved=0),
        row("order_100", "LSTM chrono"),
    ]
    found = {entry["aim"]: entry for entry in aims(rows)}
    assert [entry["met"] for entry in found.values()] == [False, False, True, True]
    assert found[AIMS[0].text]["not_by"] == ["LSTM"]
    assert found[AIMS[1].text]["by"] == ["SkipGRU"]
    assert found["some model solves order_100"]["by"] == ["LSTM chrono"]


def test_the_verdict_is_in_words():
    def table(rho: float, low: float, high: float) -> dict:
        entry = {"runs": "best rates", "outcome": "progress", "when": "before"}
        entry |= {"rho": rho, "interval": [low, high]}
        entry |= {"rho_within": math.nan, "interval_within": [math.nan, math.nan]}
        counts = {"runs": 4, "solved": 1}
        return {"correlations": [entry], "by_horizon": [{"before": counts}] * 4}

    assert "goes strongly with" in verdict(table(0.8, 0.5, 0.9))
    assert "goes moderately against" in verdict(table(-0.5, -0.7, -0.1))
    unknown = verdict(table(0.3, -0.1, 0.6))
    assert "says nothing certain" in unknown
    assert "cannot be compared" in unknown
    assert "Of 4 runs with a horizon before training below half the length, 1 reached" in unknown
    assert "of 8 runs with one of at least the length, 2." in unknown


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [("MSE", 0.0012345, "0.00123"), ("accuracy", 0.994, "99.4%"), ("MSE", math.nan, "not finite")],
)
def test_values_in_words(metric, value, words):
    assert value_in_words(metric, value) == words


# -- page and command -----------------------------------------------------------------------------


def test_the_file_keeps_four_digits_of_small_numbers(tmp_path):
    runs = runs_of({"LSTM": [0.00123456, 0.1]}, {"LSTM": 1e6})
    settings = {"device": "cpu", "quick": False, "tasks": [], "models": ["LSTM"]}
    path = write_json({"settings": settings, "runs": compact(runs), "x": math.inf}, tmp_path)
    assert path.name == "memory_cpu_part.json"
    read = json.loads(path.read_text())
    assert read["runs"][0]["value"] == 0.001235
    assert read["runs"][0]["before"] == pytest.approx(-math.log(1000) / 1e6, rel=1e-3)
    assert read["x"] is None


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """What the command writes after a few steps of two models."""
    folder, cache = (tmp_path_factory.mktemp(name) for name in ("output", "cache"))
    chosen = ["--tasks", "adding_20", "order_20", "--models", "tanh RNN", "LSTM chrono"]
    arguments = ["memory", "--quick", *chosen, "--jobs", "0"]
    files = ["--output", str(folder), "--cache", str(cache)]
    assert main([*arguments, *files]) == 0
    assert {path.name for path in cache.iterdir()} == {"tanh_RNN.jsonl", "LSTM_chrono.jsonl"}
    written = (folder / "memory_cpu_quick.json").read_text()
    assert main([*arguments, *files]) == 0  # all of it from the cache
    again = json.loads((folder / "memory_cpu_quick.json").read_text())
    result = json.loads(written)
    assert [again[key] for key in ("rows", "runs")] == [result[key] for key in ("rows", "runs")]
    assert (folder / "memory_cpu_quick.png").stat().st_size > 10_000
    return result


def test_the_command_measures_what_it_was_told(small):
    assert [(row["task"], row["model"]) for row in small["rows"]] == [
        (task, model) for task in ("adding_20", "order_20") for model in ("tanh RNN", "LSTM chrono")
    ]
    assert all(row["budget"] == 200 and row["seeds"] == 1 for row in small["rows"])
    assert len(small["runs"]) == 4
    assert not small["crashes"]
    assert small["machine"]["torch_threads"] == 1


def test_a_page_shows_every_number_of_its_file(small):
    shown = page(small)
    for row in small["rows"]:
        line = next(
            line
            for line in shown.split(f"## {row['task']}")[1].splitlines()
            if line.startswith(f"| {row['model']} |")
        )
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        metric = workload_named(row["task"]).metric
        assert cells[1:5] == [
            f"{row['parameters']:,}",
            f"{row['lr']:g}",
            value_in_words(metric, row["value"]),
            f"{row['solved']} of 1",
        ]
        spans = [row["before"]["half_life"], row["after"]["half_life"]]
        spans += [row["before"]["horizon"], row["after"]["horizon"]]
        assert [float(cell.replace(",", "")) for cell in cells[6:10]] == pytest.approx(
            spans, rel=6e-3
        )
    assert verdict(small) in shown
    assert small["machine"]["cpu"] in shown
    assert "{" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds", "0"], "--seeds must be at least 1"), (["--jobs", "-1"], "--jobs must be")],
)
def test_bad_options_are_one_sentence(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["memory", *arguments])


def test_an_unknown_name_is_told_with_those_that_are_known(capsys):
    with pytest.raises(SystemExit):
        main(["memory", "--models", "Elman"])
    assert "invalid choice: 'Elman' (choose from" in capsys.readouterr().err


def test_cuda_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda"):
        main(["memory", "--device", "cuda"])


@pytest.fixture(scope="module")
def published() -> dict:
    path = RESULTS / "memory_cpu.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not measured yet")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_published_page_is_what_the_measurements_give(published):
    assert DOCUMENT.read_text(encoding="utf-8") == page(published), "run the benchmark again"


def test_the_published_measurements_are_of_all_runs(published):
    assert {(row["task"], row["model"]) for row in published["rows"]} == {
        (workload.name, name) for workload in WORKLOADS for name in workload.models
    }
    assert published["settings"]["seeds"] >= 3
    for row in published["rows"]:
        assert row["seeds"] == published["settings"]["seeds"]
        assert row["rates"] == list(select([row["model"]])[0].rates)
    assert not published["crashes"]
