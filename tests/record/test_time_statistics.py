"""Time statistics against numpy, over ranks, and as a picture."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchmetrics.utilities.plot
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.measure.student_t import student_t
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.time_statistics import TimeDecayStatistics
from tests.distributed import run_on_ranks

MISSING = st.just(math.nan)
READINGS = st.lists(
    st.builds(
        TimeReading,
        module=st.just("rnn"),
        part=st.just("l0"),
        source=st.just("exact"),
        timesteps=st.integers(0, 300),
        decay_rate=st.floats(-3.0, 3.0) | MISSING | st.just(-math.inf),
        decay_error=st.floats(0.0, 1.0) | MISSING,
        recency=st.floats(0.0, 1.0) | MISSING,
    ),
    min_size=1,
    max_size=20,
)


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def reading(rate: float = -0.2, timesteps: int = 50, **values: Any) -> TimeReading:
    """A reading whose norms shrink at its rate, in as many bins as a profile may have."""
    bins = min(timesteps, 256)
    steps = (timesteps - 1) / max(bins - 1, 1)
    profile = tuple(math.exp(rate * steps * (bins - 1 - place)) for place in range(bins))
    values = {"profile": profile, "decay_rate": rate, "timesteps": timesteps, **values}
    return TimeReading("rnn", "l0", "exact", **values)


def filled(readings: Sequence[TimeReading], name: str = "rnn/l0") -> TimeDecayStatistics:
    metric = TimeDecayStatistics(name)
    metric.update(*readings)
    return metric


def values(metric: TimeDecayStatistics) -> dict[str, float]:
    computed = metric.compute()
    assert all(value.shape == () for value in computed.values())
    return {name: value.item() for name, value in computed.items()}


def reference(readings: Sequence[TimeReading]) -> dict[str, float]:
    usable = [each for each in readings if math.isfinite(each.decay_rate)]
    rates = np.asarray([each.decay_rate for each in usable])
    recencies = [each.recency for each in readings if math.isfinite(each.recency)]
    count = len(rates)
    rate = rates.mean() if count else math.nan
    error = usable[0].decay_error if count else math.nan
    if count > 1:
        error = student_t(count - 1) * rates.std(ddof=1) / math.sqrt(count)
    return {
        "decay_rate": rate,
        "decay_error": error,
        "recency": np.mean(recencies) if recencies else math.nan,
        "timesteps": np.mean([each.timesteps for each in readings]),
        "count": count,
        "left_out": len(readings) - count,
    }


@given(readings=READINGS)
def test_same_as_numpy(readings: list[TimeReading]) -> None:
    metric = TimeDecayStatistics()
    metric.update(readings[0])
    metric.update(*readings[1:])
    result = values(metric)
    # Of the metric's own rate: one that cancels to nearly 0 is another number in every order.
    rate = abs(result["decay_rate"])
    for name, factor in (("half_life", 2), ("horizon", 1e3)):
        steps = math.log(factor) / rate if rate else math.inf
        assert result.pop(name) == pytest.approx(steps, nan_ok=True)
    assert result == pytest.approx(reference(readings), rel=1e-6, abs=1e-6, nan_ok=True)


def test_interval_covers_the_true_rate() -> None:
    noise = np.random.default_rng(0).normal(0.0, 0.05, size=(500, 5))
    results = [
        values(filled([TimeReading("rnn", "l0", "exact", decay_rate=-0.4 + n) for n in each]))
        for each in noise
    ]
    covered = sum(abs(each["decay_rate"] + 0.4) <= each["decay_error"] for each in results)
    assert 0.92 <= covered / 500 <= 0.98


def test_one_measurement_has_its_own_error() -> None:
    assert values(filled([reading(decay_error=0.03)]))["decay_error"] == pytest.approx(0.03)


@pytest.mark.parametrize("timesteps", [1, 2, 50, 255, 256, 257, 1000, 100_000])
def test_the_curve_of_one_length_comes_back(timesteps: int) -> None:
    readings = [reading(-3 / timesteps, timesteps), reading(-5 / timesteps, timesteps)]
    _, ax = filled(readings).plot()
    positions, norms = ax.lines[-1].get_data()
    number = min(timesteps, 256)
    width = timesteps / number
    np.testing.assert_allclose(positions, (np.arange(number) + 0.5) * width - 0.5)
    mean = np.exp(np.mean(np.log([each.profile for each in readings]), axis=0))
    np.testing.assert_allclose(norms, mean, rtol=1e-9)
    assert ax.get_xlabel() == "Timestep"


def test_lengths_that_differ_share_an_axis() -> None:
    _, ax = filled([reading(-0.2, 50), reading(-0.1, 100)]).plot()
    positions, norms = ax.lines[-1].get_data()
    assert ax.get_xlabel() == "Share of the sequence"
    assert len(positions) == 256
    assert 0 < positions[0] < positions[-1] < 1
    assert norms[0] == pytest.approx(math.exp((-0.2 * 49 - 0.1 * 99) / 2))
    assert norms[-1] == pytest.approx(1.0)


def test_norms_without_a_logarithm_are_left_out_of_the_curve() -> None:
    holed = reading(0.0, 4, profile=(0.0, math.nan, 2.0, 8.0))
    _, ax = filled([holed, reading(0.0, 4, profile=(0.0, 3.0, 2.0, 2.0))]).plot()
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), [math.nan, 3.0, 2.0, 4.0])


def test_plot_says_the_half_life_on_a_log_scale() -> None:
    figure, ax = filled([reading(-0.2), reading(-0.22)]).plot()
    assert ax.figure is figure
    assert ax.get_yscale() == "log"
    assert ax.get_title() == "rnn/l0"
    (label,) = (text.get_text() for text in ax.get_legend().get_texts())
    assert label == "half-life 3.3 steps (-0.21 ± 0.13 nats/step)"
    again, same = filled([reading(0.2)]).plot(ax=ax)
    assert same is ax
    assert again is figure
    assert ax.get_legend().get_texts()[1].get_text() == "doubling 3.47 steps (+0.2 nats/step)"


def test_plot_of_values_is_that_of_torchmetrics() -> None:
    metric = filled([reading()])
    figure, ax = metric.plot([metric.compute(), metric.compute()])
    assert ax.figure is figure
    assert [line.get_label() for line in ax.lines] == list(metric.compute())


def test_plot_without_a_profile() -> None:
    figure, ax = filled([TimeReading("rnn", "l0", "output", timesteps=20)]).plot()
    figure.canvas.draw()
    assert ax.get_legend().get_texts()[0].get_text() == "rate not known"


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchmetrics.utilities.plot, "_MATPLOTLIB_AVAILABLE", False)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        filled([reading()]).plot()


def test_other_readings_are_refused() -> None:
    metric = TimeDecayStatistics("rnn/l0")
    other = TimeReading("rnn", "l1", "exact", decay_rate=-1.0)
    with pytest.raises(ValueError, match="readings must be those of 'rnn/l0', got 'rnn/l1'"):
        metric.update(reading(), other)
    assert metric.readings == 0  # all or none
    with pytest.raises(TypeError, match=r"readings must be TimeReading objects, got -0\.2"):
        metric.update(-0.2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        TimeDecayStatistics(3)  # type: ignore[arg-type]


def test_memory_does_not_grow() -> None:
    metric = filled([reading(timesteps=100_000)] * 20)
    assert sum(getattr(metric, name).numel() for name in metric._defaults) < 600


def test_reset_forgets_everything() -> None:
    metric = filled([reading(-3.0, 70), reading(math.nan, 10, profile=())])
    metric.plot()
    metric.reset()
    metric.update(reading(-0.3, decay_error=0.1))
    same_picture(metric, filled([reading(-0.3, decay_error=0.1)]))


def test_computed_values_do_not_change_afterwards() -> None:
    metric = filled([reading()])
    before = metric.compute()
    metric.update(reading())
    assert before["count"] == 1


def same_picture(one: TimeDecayStatistics, other: TimeDecayStatistics) -> None:
    assert values(one) == pytest.approx(values(other), nan_ok=True)
    lines = [metric.plot()[1].lines[-1].get_data() for metric in (one, other)]
    np.testing.assert_allclose(lines[0], lines[1])


def test_pickling_and_state_dict_keep_what_was_seen() -> None:
    readings = [reading(-0.2, 50), reading(-0.3, 90)]
    metric = filled(readings[:1])
    metric.plot()
    copy = pickle.loads(pickle.dumps(metric))
    copy.update(readings[1])
    same_picture(copy, filled(readings))
    same_picture(metric, filled(readings[:1]))
    copy.persistent(True)
    loaded = TimeDecayStatistics("rnn/l0")
    loaded.persistent(True)
    loaded.load_state_dict(copy.state_dict())
    loaded.update(readings[0])
    same_picture(loaded, filled([*readings, readings[0]]))


@pytest.mark.parametrize("lengths", [(50, 50, 50), (50, 20, 300)])
def test_merging_is_the_same_as_seeing_all(lengths: tuple[int, int, int]) -> None:
    readings = [reading(-0.1 * (place + 1), each) for place, each in enumerate(lengths)]
    metric = filled(readings[:1])
    metric._reduce_states(filled(readings[1:]).metric_state)
    same_picture(metric, filled(readings))
    metric._reduce_states(TimeDecayStatistics().metric_state)  # a rank that saw nothing
    metric._computed = None
    same_picture(metric, filled(readings))


def readings_of_rank(rank: int) -> list[TimeReading]:
    return [[reading(-0.1, 50), reading(math.nan, 20)], [reading(-0.3, 90)]][rank]


def merged() -> tuple[dict[str, float], list[float]]:
    rank = torch.distributed.get_rank()
    metric = filled(readings_of_rank(rank))
    result = values(metric)
    # On one rank alone: nothing may wait for the other.
    curve = metric.plot()[1].lines[-1].get_ydata().tolist() if rank == 0 else []
    return result, curve


@pytest.mark.slow
def test_ranks_merge_to_what_one_process_sees() -> None:
    alone = filled(readings_of_rank(0) + readings_of_rank(1))
    results = run_on_ranks(merged)
    for result, _ in results:
        assert result == pytest.approx(values(alone), rel=1e-9, nan_ok=True)
    expected = alone.plot()[1].lines[-1].get_ydata()
    np.testing.assert_allclose(results[0][1], expected)
