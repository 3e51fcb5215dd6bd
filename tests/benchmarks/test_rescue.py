"""The rescue benchmark: its rules, its faults, its arithmetic, its command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.overhead.results import RESULTS
from benchmarks.rescue.contenders import (
    AGC,
    BARE,
    CONTENDERS,
    GUARD,
    AdaGC,
    AutoClip,
    FixedClip,
    Plateau,
    select,
)
from benchmarks.rescue.document import DOCUMENT, page
from benchmarks.rescue.faults import FAULTS, Run
from benchmarks.rescue.jobs import Kept, fault_jobs, grid_jobs
from benchmarks.rescue.runner import Job, Result, run_job
from benchmarks.rescue.scoring import NOISE, score
from benchmarks.rescue.stable_adamw import StableAdamW
from benchmarks.rescue.tasks import characters, digits, score_of
from benchmarks.rescue.workloads import OPTIMIZERS, WORKLOADS, make_optimizer

LOSS = torch.tensor(1.0)


def model_with_gradients(seed: int = 0, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    return model


def total_norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))


def test_a_fixed_clip_leaves_a_norm_of_its_threshold_at_most():
    large, small = model_with_gradients(), model_with_gradients(scale=1e-3)
    before = total_norm(small)
    for model in (large, small):
        FixedClip(model, 0.5).before_step(LOSS)
    assert total_norm(large) == pytest.approx(0.5, rel=1e-4)
    assert total_norm(small) == pytest.approx(before)


def test_autoclip_clips_to_the_percentile_of_all_norms_so_far():
    model, norms = model_with_gradients(), []
    clip = AutoClip(model)
    for seed in range(20):
        for parameter, other in zip(
            model.parameters(), model_with_gradients(seed, 1 + seed % 3).parameters(), strict=True
        ):
            parameter.grad = other.grad
        norms.append(total_norm(model))
        clip.before_step(LOSS)
        assert total_norm(model) == pytest.approx(float(np.percentile(norms, 10)), rel=1e-4)


def test_agc_bounds_every_unit_but_those_of_the_head():
    model = model_with_gradients()
    head = model[2].weight.grad.clone()
    AGC(model).before_step(LOSS)
    for weight, gradient in zip(model[0].weight.detach(), model[0].weight.grad, strict=True):
        assert float(gradient.norm()) <= 0.01 * float(weight.norm()) * (1 + 1e-5)
    assert torch.equal(model[2].weight.grad, head)


def test_adagc_bounds_each_tensor_by_the_mean_of_its_clipped_norms():
    model = model_with_gradients()
    clip = AdaGC(model)
    for _ in range(AdaGC.warmup):
        clip.before_step(LOSS)  # the same gradients, after the first step of norm 1
    usual = [float(p.grad.norm()) for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad *= 50
    clip.before_step(LOSS)
    for parameter, norm in zip(model.parameters(), usual, strict=True):
        assert float(parameter.grad.norm()) == pytest.approx(1.05 * norm, rel=1e-3)


def test_a_plateau_halves_the_rate_and_progress_does_not():
    rates = {}
    for name, loss in (("flat", lambda step: 1.0), ("falling", lambda step: 0.99**step)):
        model = model_with_gradients()
        optimizer = make_optimizer("sgd", model, 0.1)
        plateau = Plateau(optimizer, 100)
        for step in range(100):
            plateau.after_step(torch.tensor(loss(step)))
        rates[name] = optimizer.param_groups[0]["lr"]
    assert rates["falling"] == 0.1
    assert rates["flat"] < 0.05


def test_stable_adamw_is_adamw_while_no_update_is_clipped():
    ours, theirs = model_with_gradients(), model_with_gradients()
    optimizers = (
        StableAdamW(ours.parameters(), lr=1e-2, eps=1e-12),
        torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-12),
    )
    for _ in range(5):  # of a constant gradient g²/v is 1
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_stable_adamw_shrinks_the_step_after_a_jump_of_the_gradient():
    moved = {}
    for factor in (1.0, 100.0):
        model = model_with_gradients()
        optimizer = StableAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(50):
            optimizer.step()
        before = model[0].weight.clone()
        for parameter in model.parameters():
            parameter.grad *= factor
        optimizer.step()
        moved[factor] = float((model[0].weight - before).detach().norm())
    assert moved[100.0] < 1.2 * moved[1.0]  # AdamW would move 7 times as far


def test_every_contender_runs_on_every_optimizer_that_it_names():
    for contender in CONTENDERS:
        for optimizer in contender.optimizers:
            result = run_job(Job("mlp_12", optimizer, 1e-3, 0, contender.name, steps=6))
            assert result.finite, contender.name


def test_a_run_repeats_exactly():
    job = Job("transformer", "adamw", 1e-3, 1, GUARD, "nan_batch", steps=20)
    first, second = run_job(job), run_job(job)
    assert (first.score, first.done) == (second.score, second.done)


def test_a_run_leaves_the_processor_as_it_was():
    run_job(Job("mlp_12", "sgd", 1e-3, 0, BARE, steps=2))
    assert float(torch.tensor(1e-40) * 0.5) > 0.0  # smaller than float32's normal numbers


@pytest.mark.parametrize("name", ["nan_batch", "inf_label", "outlier_batch", "rate_x1000"])
def test_a_fault_comes_once_and_leaves_the_data_alone(name: str):
    task = digits("vector", 8)
    batch = task.draw(torch.Generator().manual_seed(0))
    kept = [part.clone() for part in batch]
    model = nn.Linear(64, 10)
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.5), task)
    rates = []
    for since in range(12):
        inputs, labels = FAULTS[name](run, batch, since)
        rates.append(run.optimizer.param_groups[0]["lr"])
        changed = not (torch.equal(inputs, kept[0]) and torch.equal(labels, kept[1]))
        assert changed == (since == 0 and name != "rate_x1000")
    assert torch.equal(batch[0], kept[0])
    assert rates == pytest.approx([500.0] * 10 + [0.5] * 2 if "rate" in name else [0.5] * 12)


def test_a_corrupted_weight_is_one_element_in_which_one_bit_flipped():
    model = nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 10))
    before = [p.detach().clone() for p in model.parameters()]
    task = digits("vector", 8)
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.5), task)
    FAULTS["corrupted_weight"](run, task.draw(torch.Generator()), 0)
    differing = [(a != b).sum().item() for a, b in zip(model.parameters(), before, strict=True)]
    assert differing == [1, 0, 0, 0]
    assert model[0].weight.abs().max() > 1e30


def test_nothing_learned_scores_the_floor_and_nan_no_less():
    task = characters(32, 16)
    model = nn.Linear(64, 64)
    assert 0.0 <= score_of(model, task) < 0.2
    with torch.no_grad():
        model.weight.fill_(math.nan)
    assert score_of(model, task) == task.floor


def make_results(table: dict[str, list[float]], fault_scores: dict[str, float]) -> dict:
    """Scores by rate of the MLP under SGD, the same for two seeds but for a little noise."""
    workload = next(w for w in WORKLOADS if w.name == "mlp_12")
    results = {}
    for name, scores in table.items():
        for seed in range(2):
            for lr, value in zip(workload.rates("sgd"), scores, strict=True):
                job = Job("mlp_12", "sgd", lr, seed, name)
                results[job] = Result(value + 0.01 * seed, 1.0, True, {}, [])
            optimizer, lr = workload.ordinary
            twin = Job("mlp_12", optimizer, lr, seed, name)
            results[twin] = Result(scores[2], 1.0, True, {}, [])
            fault = Job("mlp_12", optimizer, lr, seed, name, "nan_batch")
            results[fault] = Result(fault_scores[name], 1.05, True, {}, [])
    return results


def test_ranges_rescues_faults_and_harm_follow_from_the_scores():
    good, bad = 0.9, 0.1
    results = make_results(
        {
            BARE: [good] * 3 + [bad] * 6,
            "clip 1.0": [good] * 4 + [bad] * 5,
            GUARD: [good, 0.8, good] + [good] * 5 + [bad],
        },
        {BARE: 0.1, "clip 1.0": 0.1, GUARD: 0.9},
    )
    tables = score(results)
    (row,) = tables["workloads"]
    assert row["target"] == pytest.approx(0.1 + 0.8 * 0.805)
    ranges = {name: entry["range"] for name, entry in row["contenders"].items()}
    assert ranges == {BARE: 1.5, "clip 1.0": 2.0, GUARD: 4.0}
    assert row["best_peer"] == "clip 1.0"
    assert row["ahead"] == 2.0
    assert tables["rescue"]["failing"] == 12
    assert tables["rescue"]["rates"][GUARD] == pytest.approx(10 / 12)
    assert tables["faults"]["rates"][GUARD]["all"] == 1.0
    assert tables["faults"]["rates"][BARE]["all"] == 0.0
    assert tables["faults"]["time_ratio"] == pytest.approx(1.05)
    harm = tables["harm"]
    assert harm["pairs"] == 6
    assert harm["identical"] == 4
    # two seeds that differ by 0.01 have a standard deviation of 0.007
    assert NOISE * math.sqrt(2) * 0.007 < 0.1
    assert len(harm["worse"]) == 2


def test_a_workload_that_nothing_else_learns_has_no_target():
    results = make_results({BARE: [0.1] * 9, GUARD: [0.9] * 9}, {BARE: 0.1, GUARD: 0.9})
    tables = score(results)
    assert tables["workloads"][0]["target"] is None
    assert tables["rescue"]["failing"] == 0
    assert tables["harm"]["pairs"] == 0


def test_grids_span_four_decades_and_hold_the_ordinary_rate():
    for workload in WORKLOADS:
        for optimizer in OPTIMIZERS:
            rates = workload.rates(optimizer)
            assert rates[-1] / rates[0] == pytest.approx(1e4, rel=1e-2)
        optimizer, lr = workload.ordinary
        assert workload.rates(optimizer)[0] <= lr <= workload.rates(optimizer)[-1]


def test_what_is_kept_is_not_run_again(tmp_path):
    workloads = [w for w in WORKLOADS if w.name == "mlp_12"]
    jobs = [*grid_jobs(workloads, select([BARE]), 1), *fault_jobs(workloads, select([BARE]), 1)]
    kept = Kept(tmp_path)
    kept.add(jobs[3], Result(0.5, 1.0, True, {}, []))
    again = Kept(tmp_path)
    assert again.results == kept.results
    assert again.missing(jobs) == [job for job in jobs if job != jobs[3]]


@pytest.mark.slow
def test_the_command_measures_prints_and_writes(tmp_path, capsys):
    arguments = ["--quick", "--workloads", "mlp_12", "--contenders", BARE, GUARD, "--jobs", "0"]
    assert main(["rescue", *arguments, "--output", str(tmp_path)]) == 0
    assert "healthy pairs" in capsys.readouterr().out
    result = json.loads((tmp_path / "rescue_cpu_quick.json").read_text())
    assert {entry["optimizer"] for entry in result["workloads"]} == set(OPTIMIZERS)
    assert (tmp_path / "rescue_cpu_quick.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds", "0"], "--seeds must be at least 1"), (["--jobs", "-1"], "--jobs must be")],
)
def test_bad_options_are_one_sentence(arguments: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        main(["rescue", *arguments])


@pytest.fixture(scope="module")
def published() -> dict:
    return json.loads((RESULTS / "rescue_cpu.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_measurements_give(published: dict):
    assert DOCUMENT.read_text(encoding="utf-8") == page(published), "run the benchmark again"


def test_the_measurements_are_of_all_runs(published: dict):
    everyone = {contender.name: contender.optimizers for contender in CONTENDERS}
    assert [(e["workload"], e["optimizer"]) for e in published["workloads"]] == [
        (workload.name, optimizer) for workload in WORKLOADS for optimizer in OPTIMIZERS
    ]
    for entry in published["workloads"]:
        names = {name for name, optimizers in everyone.items() if entry["optimizer"] in optimizers}
        assert set(entry["contenders"]) == names
        for row in entry["contenders"].values():
            assert len(row["scores"]) == len(entry["rates"])
            assert None not in row["scores"]
    assert not published["crashes"]
