"""Pictures for loggers show the run, at a bounded cost."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.pictures import DrawingBudget, heat_maps
from lightning_gradguard.record.run_history import LayerMatrix, OptimizerHistory
from tests.record.runs import made_up_run

BRIGHT, DARK = [(np.array(mpl.colormaps["viridis"](end)[:3]) * 255).round() for end in (1.0, 0.0)]


def layers(values, **changed) -> OptimizerHistory:
    names = tuple(f"layers.{number}" for number in range(values.shape[1]))
    matrix = LayerMatrix(names, np.arange(len(values)) * 10.0, values)
    return OptimizerHistory(layers=matrix, **changed)


def close_to(picture, color) -> np.ndarray:
    """Which pixels have that color, of the map only: the color bar is cut off."""
    return (np.abs(picture[:, :540].astype(float) - color) < 12).all(axis=2)


# -- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "count"), [(400, 6), (20_000, 200)])
def test_pictures_are_small_and_their_keys_suit_every_logger(steps, count):
    pictures = heat_maps(made_up_run(steps, count).optimizers[0])

    assert list(pictures) == ["grad_norm/heat_map", "grad_time/encoder.rnn/heat_map"]
    for key, picture in pictures.items():
        assert re.fullmatch(r"[A-Za-z0-9_./]+", key)
        assert picture.shape == (360, 640, 3)
        assert picture.dtype == np.uint8
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert plt.get_fignums() == []


def test_the_label_of_the_optimizer_is_in_the_keys():
    pictures = heat_maps(replace(made_up_run().optimizers[0], label="optimizer1"))

    assert list(pictures) == [
        "grad_norm/optimizer1/heat_map",
        "grad_time/optimizer1/encoder.rnn/heat_map",
    ]


def test_the_first_layer_is_on_top_and_steps_go_to_the_right():
    values = np.full((40, 4), 1.0)
    values[:, 0] = 1e3  # the first layer
    values[20:, 3] = 1e-3  # the last one, in the second half
    (picture,) = heat_maps(layers(values)).values()

    bright = np.argwhere(close_to(picture, BRIGHT)).mean(axis=0)
    dark = np.argwhere(close_to(picture, DARK))
    assert bright[0] < 120
    assert dark[:, 0].min() > 200
    assert dark[:, 1].mean() > 380


def test_the_last_timestep_is_at_the_bottom():
    profile = tuple(np.logspace(-6, 0, 30))  # nothing gets back to the first timestep
    times = tuple(
        TimeReading("rnn", "", "exact", timesteps=30, profile=profile, step=n) for n in range(5)
    )
    (picture,) = heat_maps(OptimizerHistory(times=times)).values()

    assert np.argwhere(close_to(picture, BRIGHT))[:, 0].min() > 250
    assert np.argwhere(close_to(picture, DARK))[:, 0].max() < 120


def test_sequences_of_different_lengths_meet_at_the_end():
    times = tuple(
        TimeReading("rnn", "", "exact", timesteps=n, profile=(1.0,) * n, step=n) for n in (10, 20)
    )
    (picture,) = heat_maps(OptimizerHistory(times=times)).values()

    drawn = picture[12:312, 70:540]
    gray = np.argwhere((drawn == 191).all(axis=2))  # steps that the shorter lacks
    assert gray.size
    assert gray[:, 0].max() < 160
    assert gray[:, 1].max() < 400


def test_modules_through_time_are_a_few():
    times = tuple(
        TimeReading(f"rnn{n}", "", "exact", timesteps=3, profile=(1.0, 2.0, 3.0)) for n in range(9)
    )
    history = OptimizerHistory(times=times)

    assert list(heat_maps(history)) == [f"grad_time/rnn{n}/heat_map" for n in range(4)]
    assert len(heat_maps(history, most_modules=1)) == 1
    with pytest.raises(ValueError, match="most_modules must be an integer >= 0"):
        heat_maps(history, most_modules=-1)


@pytest.mark.parametrize(
    "values", [np.full((5, 3), math.nan), np.zeros((5, 3)), np.full((5, 3), math.inf)]
)
def test_what_has_nothing_to_draw_is_left_out(values):
    assert heat_maps(layers(values)) == {}
    assert heat_maps(OptimizerHistory()) == {}


def test_a_layer_of_any_name_is_drawn_as_it_is_called():
    matrix = LayerMatrix(("a$b", "<script>", "x_1^2"), np.arange(2.0), np.ones((2, 3)))

    assert list(heat_maps(OptimizerHistory(layers=matrix))) == ["grad_norm/heat_map"]


# -- when -----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    share=st.floats(1e-3, 0.5),
    every=st.floats(0.0, 100.0),
    moments=st.lists(
        st.tuples(st.floats(0.01, 500.0), st.floats(0.0, 5.0)), min_size=1, max_size=200
    ),
)
def test_drawing_takes_no_more_than_its_share(share, every, moments):
    clock = Clock()
    budget = DrawingBudget(share, every_seconds=every, spacing=0.0, clock=clock)
    spent, times = 0.0, [clock.now]
    for pause, cost in moments:
        clock.now += pause
        if budget.due():
            assert spent <= share * (clock.now - 1000.0) * (1 + 1e-9)
            assert clock.now - times[-1] >= every * (1 - 1e-9)
            with budget.drawing():
                clock.now += cost
            spent += cost
            times.append(clock.now)


@given(cost=st.floats(0.01, 5.0), step=st.floats(0.01, 20.0))
def test_it_draws_as_often_as_it_may(cost, step):
    clock = Clock()
    budget = DrawingBudget(0.01, every_seconds=10.0, spacing=0.0, clock=clock)
    drawn = 0
    for _ in range(int(2000.0 / step)):
        clock.now += step
        if budget.due():
            drawn += 1
            with budget.drawing():
                clock.now += cost
    elapsed = clock.now - 1000.0
    assert drawn >= math.floor(elapsed / (max(cost / 0.01, 10.0) + step + cost)) - 1


def test_a_run_of_days_leaves_some_hundred_pictures():
    clock, drawn = Clock(), 0
    budget = DrawingBudget(clock=clock)
    for _ in range(7 * 24 * 60):
        clock.now += 60.0
        if budget.due():
            drawn += 1
            with budget.drawing():
                clock.now += 0.1
    assert 100 < drawn < 200


def test_what_fails_counts_too():
    clock = Clock()
    budget = DrawingBudget(0.5, every_seconds=0.0, spacing=0.0, clock=clock)

    def draw():
        with budget.drawing():
            clock.now += 10.0
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        draw()

    clock.now += 19.0
    assert not budget.due()
    clock.now += 1.0
    assert budget.due()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"share": 0.0}, "share must be a number > 0 and <= 1, got 0.0"),
        ({"every_seconds": -1.0}, "every_seconds must be a number >= 0, got -1.0"),
        ({"spacing": math.nan}, "spacing must be a number >= 0, got nan"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DrawingBudget(**changed)
