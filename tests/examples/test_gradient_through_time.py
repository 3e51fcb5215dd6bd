"""The gradient through time on real digits: what is measured, said and drawn, in seconds."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.examples.loading import geometric_reading, load, pixels

TIMESTEPS = 64
geometric = partial(geometric_reading, timesteps=TIMESTEPS)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("gradient_through_time", "rich", "sklearn")


@pytest.fixture(scope="module")
def nets(example: ModuleType) -> ModuleType:
    return importlib.import_module("gradient_through_time_nets")


CLOSED, OPEN = math.log(0.5), -0.01


@pytest.fixture
def net(nets: ModuleType) -> Callable[..., object]:
    """A net whose gradient changed at these rates, one reading every 10 steps."""

    def make(*rates: float) -> object:
        readings = [geometric(rate, step=10 * index) for index, rate in enumerate(rates)]
        return nets.Net("LSTM", 0.876, readings)

    return make


# -- the whole program -----------------------------------------------------------------------------


def test_a_quick_run_measures_draws_and_tells(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    assert example.main(["--quick", "--steps", "6"]) == 0

    printed = capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["gradient_through_time.png"]
    assert pixels(tmp_path / "gradient_through_time.png").std() > 0.05  # a blank page has no spread
    for kind in ("tanh RNN", "ReLU RNN", "LSTM", "GRU"):
        assert f"\n{kind}/l0 " in printed.out
        # No recurrent module of torch starts out with a gradient that gets through 64 steps.
        assert f"\n{kind}: before training the gradient halves every" in printed.out
    assert f"0.8^50 is {0.8**50:.5g}" in printed.out
    assert "Warning" not in printed.out + printed.err


@pytest.mark.slow
def test_training_opens_the_way_through_time(
    example: ModuleType, nets: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with example.quiet():
        trained = example.train("LSTM", nets.Classifier("LSTM"), 60, 0)

    assert [reading.step for reading in trained.readings] == list(range(0, 60, 2))
    assert not nets.reaches_all(trained.start)
    assert nets.reaches_all(trained.end)
    assert trained.end.decay_rate > trained.start.decay_rate / 3


def test_each_kind_is_the_module_that_it_says(nets: ModuleType) -> None:
    modules = [nets.Classifier(kind).rnn for kind in nets.KINDS]

    assert [str(module) for module in modules] == [
        "RNN(1, 64, batch_first=True)",
        "RNN(1, 64, batch_first=True)",
        "LSTM(1, 64, batch_first=True)",
        "GRU(1, 64, batch_first=True)",
    ]
    assert [module.nonlinearity for module in modules[:2]] == ["tanh", "relu"]


# -- the textbook curve ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_the_linear_net_loses_what_the_textbook_says(
    example: ModuleType, nets: ModuleType, seed: int
) -> None:
    with example.quiet():
        reading = example.measure_textbook(seed)

    assert reading.source == "exact"
    assert reading.timesteps == 51
    curve = nets.relative(reading)
    assert curve[50] == pytest.approx(0.8**50, rel=1e-3)
    assert curve == pytest.approx([0.8**lag for lag in range(51)], rel=1e-3)
    assert reading.decay_rate == pytest.approx(math.log(0.8), rel=1e-4)


# -- what it says ----------------------------------------------------------------------------------


@given(rate=st.floats(-3.0, 0.5))
def test_the_reach_is_that_of_the_closed_form(nets: ModuleType, rate: float) -> None:
    lags = [lag for lag in range(TIMESTEPS) if rate * lag < -math.log(1e3)]
    expected = lags[0] if lags else TIMESTEPS

    # A norm that is 1/1000 to within rounding may count either way.
    close = any(math.isclose(rate * lag, -math.log(1e3), rel_tol=1e-9) for lag in range(TIMESTEPS))
    assert nets.reached(geometric(rate)) == expected or close


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((CLOSED, CLOSED), "reaches every timestep at no step of training"),
        ((OPEN, OPEN), "from step 0 on more than 1/1000 reaches every timestep"),
        ((CLOSED, OPEN, OPEN), "from step 10 on more than 1/1000 reaches every timestep"),
        (
            (CLOSED, OPEN, CLOSED, OPEN, OPEN),
            "at step 10 for the first time, and from step 30 on whenever it is measured",
        ),
        ((CLOSED, OPEN, CLOSED), "reaches every timestep at step 10, but not to the end"),
    ],
)
def test_when_the_way_opened_follows_from_the_readings(
    example: ModuleType, net: Callable[..., object], rates: tuple[float, ...], said: str
) -> None:
    assert said in example.sentence(net(*rates))


def test_the_sentence_follows_from_start_end_and_accuracy(
    example: ModuleType, net: Callable[..., object]
) -> None:
    said = example.sentence(net(CLOSED, 0.01))

    assert said.startswith(
        "LSTM: before training the gradient halves every 1.0 steps and falls below 1/1000 within "
        "10 of 63 steps back; "
    )
    assert said.endswith(
        f"at the end the first timestep receives {math.exp(0.63):.2g} times the norm of the last, "
        "and the test accuracy is 0.88."
    )


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (-0.5, "halves every 1.4 steps"),
        (0.5, "doubles every 1.4 steps"),
        (0.0, "keeps its norm"),
        (math.nan, "has no known rate"),
    ],
)
def test_the_pace_of_any_rate(example: ModuleType, rate: float, said: str) -> None:
    assert example.pace(rate) == said


def test_the_end_is_the_geometric_mean_of_the_last_tenth(net: Callable[..., object]) -> None:
    rates = [CLOSED] * 18 + [-0.1, 0.3]

    end = net(*rates).end

    assert end.decay_rate == pytest.approx(0.1)
    assert end.profile == pytest.approx(geometric(0.1).profile)
    assert math.isnan(end.decay_error)


# -- the picture -----------------------------------------------------------------------------------


def test_gradients_that_are_zero_or_no_numbers_are_drawn(
    example: ModuleType, nets: ModuleType, tmp_path: Path
) -> None:
    gone = replace(geometric(-1.0), profile=(0.0,) * 60 + (1e-30, 1e-20, 1e-10, 0.01))
    broken = replace(geometric(math.nan), profile=(math.nan,) * TIMESTEPS)
    drawn = [nets.Net(kind, 0.1, [gone, replace(broken, step=5)]) for kind in nets.KINDS]

    example.save_figure(drawn, geometric(math.log(0.8), timesteps=51), tmp_path / "out.png")

    assert pixels(tmp_path / "out.png").std() > 0.05


@given(last=st.integers(1, 100_000))
def test_ticks_are_few_and_on_the_axis(example: ModuleType, last: int) -> None:
    figure = importlib.import_module("gradient_through_time_figure")

    ticks = figure.step_ticks(last)

    assert ticks[0] == 0
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 8
    assert max(ticks) <= last


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "steps"), [([], 600), (["--quick"], 100), (["--quick", "--steps", "7"], 7)]
)
def test_the_number_of_steps(example: ModuleType, arguments: list[str], steps: int) -> None:
    assert example.parse(arguments).steps == steps


def test_bad_arguments_are_refused(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        example.main(["--steps", "0"])

    assert stopped.value.code == 2
    assert "must be" in capsys.readouterr().err
