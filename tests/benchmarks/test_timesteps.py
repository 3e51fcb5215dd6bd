"""What gradients through time cost: that the benchmark measures what it says."""

from __future__ import annotations

import gc
import json
import math
from contextlib import contextmanager

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.overhead.timing import Schedule
from benchmarks.timesteps import agreement, trainer
from benchmarks.timesteps.memory import peak_memory
from benchmarks.timesteps.models import FUSED, Shape, Task
from benchmarks.timesteps.results import _print_agreement, print_tables, share_of_run
from benchmarks.timesteps.timing import compare
from benchmarks.timesteps.variants import CHEAP, EXACT, exact, plain

TINY = Shape(timesteps=20, sequences=4, input_size=3, hidden_size=8)
SIZES = [str(size) for size in TINY]


def _hooks(task: Task) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in task.model.modules())


def _summary(median: float) -> dict:
    entry = {"median": median, "quartiles": [median, median], "with_logging": None, "step_ms": 1.0}
    return {"cpu": entry, "wall": entry}


@pytest.mark.slow
def test_tables_json_and_plot(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["timesteps", "--quick", "--kinds", "gru", "lstm", "--shape", *SIZES]

    assert main([*arguments, "--output", str(tmp_path)]) == 0

    result = json.loads((tmp_path / "timesteps_cpu_quick.json").read_text())
    assert result["settings"]["shape"] == TINY._asdict()
    assert result["machine"]["torch_threads"] == 1
    for part in ("cheap", "exact", "trainer", "share", "memory", "agreement"):
        assert list(result[part]) == ["gru", "lstm"]
    assert set(result["exact"]["gru"]) == set(EXACT)
    assert set(result["cheap"]["gru"]["data"]) == set(CHEAP["data"])
    assert result["agreement"]["gru"]["gradients"]["cell"] is None
    assert result["agreement"]["lstm"]["gradients"]["cell"] < 1e-5
    assert (tmp_path / "timesteps_cpu_quick.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out

    print_tables(result)  # what was read back shows the same tables

    assert capsys.readouterr().out.strip() in shown
    for title in ("Cheap: ", "Cheap, in a Trainer", "Exact: ", "By default", "Peak", "Agreement"):
        assert f"\n{title}" in shown


def test_one_part_alone_needs_no_other(tmp_path, capsys) -> None:
    arguments = ["timesteps", "--quick", "--kinds", "rnn", "--shape", *SIZES]

    assert main([*arguments, "--parts", "agreement", "--output", str(tmp_path)]) == 0

    shown = capsys.readouterr().out
    assert "dL/dh" in shown
    assert "Cheap" not in shown
    assert not list(tmp_path.glob("*.png"))


def test_cuda_without_a_device_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda"):
        main(["timesteps", "--device", "cuda"])


def test_sizes_too_small_to_mean_anything_are_refused() -> None:
    with pytest.raises(SystemExit, match="--shape"):
        main(["timesteps", "--shape", "1", "4", "3", "8"])


@pytest.mark.parametrize("inputs", ["data", "embedding"])
@pytest.mark.parametrize("kind", FUSED)
def test_unrolled_cells_are_the_same_model(kind, inputs) -> None:
    task = Task(kind, TINY, "cpu", inputs)
    twin = task.unrolled()
    fused, cells = task.model(task.inputs), twin.model(twin.inputs)
    torch.testing.assert_close(fused, cells)

    task.backward()
    wanted = {name: p.grad.clone() for name, p in task.classifier.rnn.named_parameters()}
    twin.backward()

    for name, parameter in twin.cells.cell.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[f"{name}_l0"])
    assert len(twin.cells.hidden) == TINY.timesteps
    assert all(h.grad is not None for h in twin.cells.hidden)


@pytest.mark.parametrize("kind", FUSED)
def test_all_ways_agree(kind) -> None:
    task = Task(kind, TINY, "cpu")

    gradients, rates = agreement.compare_gradients(task), agreement.compare_rates(task)

    assert gradients["hidden"] < 1e-5
    assert gradients["timesteps"] == TINY.timesteps
    assert (gradients["cell"] is not None) == (kind == "lstm")
    assert rates["exact"] < 0
    assert rates["cheap"] == pytest.approx(rates["exact"], rel=0.1)
    assert rates["notes"] == []


def test_a_rate_that_was_not_measured_is_said_and_not_replaced_by_another(capsys) -> None:
    task = Task("lstm", TINY, "cpu")
    task.classifier.rnn.weight_hh_l0 = type("Special", (torch.nn.Parameter,), {})(
        task.classifier.rnn.weight_hh_l0.detach()
    )

    rates = agreement.compare_rates(task)

    assert rates["exact"] is None
    assert rates["cheap"] < 0
    (note,) = rates["notes"]
    gradients = {"hidden": 1e-7, "cell": None, "timesteps": 20}
    _print_agreement({"agreement": {"lstm": {"gradients": gradients, "decay_rate": rates}}})
    assert note in capsys.readouterr().out


def test_a_wrong_gradient_at_one_timestep_is_seen_and_what_has_no_digits_left_is_not() -> None:
    states = [torch.zeros(2, 3, requires_grad=True) for _ in range(3)]
    for state, scale in zip(states, (1e-40, 1e-10, 1.0), strict=True):
        state.grad = torch.full((2, 3), scale)
    ours_TBH = torch.stack([2 * states[0].grad, 1.25 * states[1].grad, states[2].grad])

    largest, timesteps = agreement._difference(ours_TBH, states)

    assert largest == pytest.approx(0.25)
    assert timesteps == 2


def test_a_gradient_that_is_nan_does_not_pass_for_agreement() -> None:
    state = torch.zeros(2, 3, requires_grad=True)
    state.grad = torch.ones(2, 3)

    largest, _ = agreement._difference(torch.full((1, 2, 3), math.nan), [state])

    assert math.isnan(largest)


def test_every_variant_has_its_turn_in_every_round_and_leaves_the_model_as_it_was() -> None:
    task = Task("gru", TINY, "cpu")
    frozen = gc.get_freeze_count()

    results = compare(
        task, {**CHEAP["data"], **EXACT}, Schedule(warm_steps=1, rounds=3, steps=1), lambda line: 0
    )

    assert list(results) == [*CHEAP["data"], *EXACT]
    assert {results[name]["cpu"]["turns"] for name in results} == {3}
    assert all(results[name]["wall"]["median"] > 0 for name in results)
    assert _hooks(task) == 0
    assert not task.inputs.requires_grad
    assert gc.get_freeze_count() == frozen


def test_the_ratio_is_that_of_time() -> None:
    task = Task("rnn", TINY, "cpu")

    @contextmanager
    def threefold(task):
        def step() -> None:
            for _ in range(3):
                task.step()

        yield step

    schedule = Schedule(warm_steps=5, rounds=9, steps=4)
    results = compare(task, {"threefold": threefold, "plain": plain}, schedule, lambda line: None)

    # Far apart, because others may be at work on this machine.
    assert 2.0 < results["threefold"]["cpu"]["median"] < 4.5
    assert 0.6 < results["plain"]["cpu"]["median"] < 1.7


def test_peak_memory_sees_what_is_held_for_a_moment() -> None:
    task = Task("rnn", TINY, "cpu")
    size = 4 << 20

    @contextmanager
    def hungry(task):
        def step() -> None:
            task.backward()
            torch.empty(size, dtype=torch.uint8).fill_(1)
            task.optimizer.step()

        yield step

    bare, more = peak_memory(task, plain), peak_memory(task, hungry)

    weights = sum(4 * p.numel() for p in task.model.parameters())
    assert bare > 2 * weights
    assert more - bare == pytest.approx(size, rel=0.05)
    assert peak_memory(task, exact) > bare


def test_the_share_of_a_run_counts_each_measurement_as_often_as_it_is_made() -> None:
    medians = {"control": 1.0, "asleep": 1.001, "cheap": 1.1, "cheap_read": 1.251}
    result = {
        "settings": {"clock": "cpu"},
        "cheap": {"lstm": {"data": {name: _summary(value) for name, value in medians.items()}}},
        "exact": {"lstm": {"exact": _summary(3.251)}},
    }

    # 0.1 % on each step, a quarter of a step more on each 50th, two steps more on each 300th.
    assert share_of_run(result) == {"lstm": {"data": pytest.approx(0.1 + 0.5 + 2 / 3)}}
    del result["exact"]
    assert share_of_run(result) == {}


@pytest.mark.slow
@pytest.mark.parametrize("exact_too", [False, True])
def test_guards_are_compared_in_a_trainer(exact_too, tmp_path) -> None:
    results = trainer.compare(
        "lstm",
        TINY,
        Schedule(warm_steps=3, rounds=2, steps=2),
        exact=exact_too,
        device="cpu",
        directory=tmp_path,
        say=lambda line: None,
    )

    assert list(results) == ["control", "auto"]
    assert results["auto"]["cpu"]["turns"] == 2
