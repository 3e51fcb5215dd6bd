"""One line for another: what is swapped, measured, said and drawn, in seconds."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.tasks import TemporalOrder
from tests.examples.loading import geometric_reading, load, pixels

TIMESTEPS = 40
geometric = partial(geometric_reading, timesteps=TIMESTEPS)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("recurrent_remedies")


@pytest.fixture(scope="module")
def nets(example: ModuleType) -> ModuleType:
    return importlib.import_module("recurrent_remedies_nets")


@pytest.fixture
def net(nets: ModuleType) -> Callable[..., object]:
    """A net with these readings, made of rates before and after."""

    def make(name: str, before: float, after: float, **values: object) -> object:
        readings = [geometric(before), geometric(after, step=7)]
        known = {
            "code": "RNN()", "losses": [1.0, 0.5], "accuracy": 0.3, "updates": math.nan,
            "readings": readings, "found": False, "report": "", "seconds": 1.0,
        }  # fmt: skip
        return nets.Net(name=name, **{**known, **values})

    return make


# -- the whole program -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_swaps_all_and_tells(
    example: ModuleType,
    nets: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    assert example.main(["--quick", "--steps", "3", "--length", "40"]) == 0

    printed = capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["recurrent_remedies.png"]
    assert pixels(tmp_path / "recurrent_remedies.png").std() > 0.05  # a blank page has no spread
    assert "GradGuard report" in printed.out
    for name in nets.SWAPS:
        assert f"\n{name}: 3 steps in" in f"\n{printed.out}"
    assert "Warning" not in printed.out + printed.err


@pytest.mark.slow
def test_the_guard_names_what_one_line_mends(example: ModuleType, nets: ModuleType) -> None:
    with example.quiet():
        before = example.train("nn.RNN", 50, 450, 0)
        after = example.train("TemporalSkipRNN", 50, 160, 0)

    assert before.found
    assert "vanishing_in_time" in before.report
    assert before.start.ends
    assert not after.found
    assert not after.start.ends
    assert after.loss < 0.1 < 1.0 < before.loss


# -- what is swapped -------------------------------------------------------------------------------


def test_each_is_one_line_of_another_module(nets: ModuleType) -> None:
    task = TemporalOrder(TIMESTEPS, batch_size=4, train_size=8)
    inputs, targets = next(iter(task.train_dataloader()))
    kinds = []
    for swap in nets.SWAPS.values():
        model = nets.OrderNamer(task, swap)
        loss = model.training_step((inputs, targets), 0)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        kinds.append(type(model.pool or model.rnn).__name__)

    assert kinds == [
        "RNN", "RNN", "LSTM", "LSTM", "GRU", "LayerNormGRU", "SkipGRU", "DilatedRNN",
        "TemporalSkipRNN", "TemporalAttention",
    ]  # fmt: skip


def test_only_a_skip_rnn_pays_for_its_updates(nets: ModuleType) -> None:
    task = TemporalOrder(TIMESTEPS, batch_size=4, train_size=8)
    batch = next(iter(task.train_dataloader()))
    paid = {}
    for name in ("GRU", "SkipGRU"):
        torch.manual_seed(0)
        model = nets.OrderNamer(task, nets.SWAPS[name])
        paid[name] = float(model.training_step(batch, 0).detach() - model.losses[-1])

    # At first it updates at every timestep.
    assert paid == {"GRU": 0.0, "SkipGRU": pytest.approx(TIMESTEPS * nets.COST_OF_UPDATE, rel=1e-3)}


# -- what is read ----------------------------------------------------------------------------------


@given(rate=st.floats(-3.0, 0.5))
def test_the_reach_is_that_of_the_closed_form(nets: ModuleType, rate: float) -> None:
    moment = nets.Moment([geometric(rate)])
    limit = -math.log(1e3)
    expected = sum(rate * lag >= limit for lag in range(TIMESTEPS))

    # A norm that is 1/1000 to within rounding may count either way.
    close = any(math.isclose(rate * lag, limit, rel_tol=1e-9) for lag in range(TIMESTEPS))
    assert moment.reach == expected or close
    assert moment.ends == (moment.reach < TIMESTEPS)
    assert moment.first == pytest.approx(math.exp(rate * (TIMESTEPS - 1)))


def test_a_stack_is_told_by_its_slowest_layer_and_drawn_by_its_first(nets: ModuleType) -> None:
    bottom, top = geometric(-1.0, name="layers.0"), geometric(-0.1, name="layers.1")

    moment = nets.Moment([bottom, top])

    assert moment.half_life == top.half_life
    assert moment.curve == nets.Moment([bottom]).curve


def test_before_and_after_are_the_first_and_the_last_measurement(
    net: Callable[..., object],
) -> None:
    made = net("GRU", -0.7, -0.1)

    assert [r.decay_rate for r in made.start.readings] == [-0.7]
    assert [r.decay_rate for r in made.end.readings] == [-0.1]
    assert made.loss == 0.5


# -- what it says and draws ------------------------------------------------------------------------


def test_the_table_and_the_verdict_follow_from_the_nets(
    example: ModuleType, net: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        net("nn.RNN", math.log(0.5), math.log(0.5), found=True),
        net("GRU", -0.5, -0.001, accuracy=1.0),
        net("SkipGRU", -0.5, 0.0, updates=0.53),
    ]

    example.print_table(made)
    example.print_verdict(made)

    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert " ".join(rows["nn.RNN"]) == "nn.RNN 0.5000 0.30 1.0 → 1.0 10 → 10 10 → 10"
    assert " ".join(rows["SkipGRU"]).endswith("1.4 → ∞ 14 → ∞ 14 → all 53%")
    assert "the guard says so." in lines[-3]
    assert lines[-2] == "One line later the task is solved by: GRU."
    assert lines[-1] == "Not (yet) by: SkipGRU."


def test_gradients_that_are_zero_are_drawn(
    example: ModuleType, net: Callable[..., object], tmp_path: Path
) -> None:
    gone = replace(geometric(-1.0), profile=(0.0,) * (TIMESTEPS - 1) + (0.01,))
    drawn = [net("nn.RNN", -1.0, -1.0, readings=[gone]), net("GRU", -0.5, -0.1, losses=[0.0])]

    example.save_figure(drawn, 1.386, tmp_path / "out.png")

    assert pixels(tmp_path / "out.png").std() > 0.05


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "steps"), [([], 800), (["--quick"], 100), (["--quick", "--steps", "7"], 7)]
)
def test_the_number_of_steps(example: ModuleType, arguments: list[str], steps: int) -> None:
    assert example.parse(arguments).steps == steps


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--length", "39"]])
def test_bad_arguments_are_refused(
    example: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)

    assert stopped.value.code == 2
    assert "must be at least" in capsys.readouterr().err
