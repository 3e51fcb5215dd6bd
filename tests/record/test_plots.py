"""Figures show the run's numbers, at any size of it, and leave nothing behind."""

from __future__ import annotations

import gc
import io
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from lightning_gradguard.diagnose import Severity
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record._plot_data import grid, series
from lightning_gradguard.record._plot_events import _ACTIONS
from lightning_gradguard.record.plots import plot_layers, plot_norms, plot_timesteps
from lightning_gradguard.record.run_history import LayerMatrix, OptimizerHistory, RunHistory
from lightning_gradguard.respond.actions import Action, ActionKind
from tests.record.runs import made_up_run

PLOTS = (plot_norms, plot_layers, plot_timesteps)
NUMBERS = st.floats(1e-30, 1e30) | st.sampled_from([0.0, math.nan, math.inf])


def part(**changed: Any) -> OptimizerHistory:
    return replace(made_up_run().optimizers[0], **changed)


def labelled(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def reading(rate: float = -0.1, timesteps: int = 50, **values: Any) -> TimeReading:
    """Whose norms shrink at its rate from the last timestep back."""
    bins = min(timesteps, 256)
    back = timesteps - 1 - ((np.arange(bins) + 0.5) * timesteps / bins - 0.5)
    profile = tuple((2.0 * np.exp(rate * back)).tolist())
    values = {"decay_rate": rate, "timesteps": timesteps, "profile": profile, **values}
    return TimeReading(**{"module": "rnn", "part": "l0", "source": "exact", **values})


# -- of all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", PLOTS)
def test_a_figure_of_its_own_is_nobody_elses(plot):
    settings = dict(mpl.rcParams)
    figure, ax = plot(made_up_run())

    assert isinstance(figure, Figure)
    assert ax.figure is figure
    assert figure.get_size_inches()[0] == 3.4
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == settings

    left = weakref.ref(figure)
    del figure, ax
    gc.collect()
    assert left() is None


@pytest.mark.parametrize("plot", PLOTS)
def test_it_is_drawn_where_the_user_wants_it(plot):
    figure, axes = plt.subplots(1, 2)
    returned = plot(made_up_run().optimizers[0], ax=axes[1])
    plt.close(figure)

    assert returned == (figure, axes[1])
    assert not axes[0].has_data()


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_it_is_written_as_any_kind_of_file(plot, kind):
    figure, _ = plot(made_up_run(3000, 40))
    file = io.BytesIO()
    figure.savefig(file, format=kind)

    assert 1_000 < len(file.getvalue()) < 300_000


@pytest.mark.parametrize("plot", PLOTS)
def test_an_empty_run_is_refused_in_one_sentence(plot):
    for empty in (RunHistory(), RunHistory(optimizers=(OptimizerHistory(),)), OptimizerHistory()):
        with pytest.raises(ValueError, match=r"^run must have [^.]*, got [^.]*$"):
            plot(empty)


@pytest.mark.parametrize("plot", PLOTS)
def test_one_of_several_optimizers_is_drawn(plot):
    parts = [replace(made_up_run().optimizers[0], label=name) for name in ("g", "d")]
    run = RunHistory(optimizers=(OptimizerHistory("empty"), *parts))

    plot(run, optimizer="d")

    with pytest.raises(ValueError, match="optimizer must be one of 'empty', 'g', 'd', got 'x'"):
        plot(run, optimizer="x")
    with pytest.raises(ValueError, match="run must have"):
        plot(run)  # the first
    with pytest.raises(TypeError, match="run must be a RunHistory"):
        plot("lightning_logs/version_0")


def test_the_users_settings_stay():
    with mpl.rc_context({"font.size": 15.0, "image.cmap": "magma", "axes.spines.top": True}):
        _, ax = plot_layers(made_up_run())
    _, default = plot_layers(made_up_run())

    assert (ax.xaxis.label.get_size(), default.xaxis.label.get_size()) == (15.0, 8.0)
    assert (ax.images[0].get_cmap().name, default.images[0].get_cmap().name) == ("magma", "viridis")


def test_ticks_made_later_have_the_size_of_the_labels():
    figure, ax = plot_norms(made_up_run())
    figure.savefig(io.BytesIO())

    sizes = {label.get_size() for label in (*ax.get_xticklabels(), *ax.get_yticklabels())}
    assert len(sizes) == 1
    assert sizes.pop() < 8.0


def test_nothing_is_loaded_before_it_is_needed():
    code = (
        "import sys; from lightning_gradguard.record import plots, pictures, logger_images;"
        "print({'matplotlib', 'lightning', 'wandb', 'tensorboard', 'mlflow'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout == "set()\n"


# -- norms ----------------------------------------------------------------------------------------


def test_norms_and_threshold_are_those_of_the_run():
    run = made_up_run()
    _, ax = plot_norms(run)

    lines, steps = labelled(ax), run.optimizers[0].steps
    np.testing.assert_array_equal(lines["gradient norm"].get_ydata(), steps["total_norm"])
    limit = lines["clip threshold"].get_ydata()
    assert np.isnan(limit[:20]).all()  # while there was no baseline
    assert (limit[20:] == 10.0).all()
    assert ax.get_yscale() == "log"
    bottom, top = ax.get_ylim()
    assert bottom < np.nanmin(steps["total_norm"]) < np.nanmax(steps["total_norm"]) < top


def test_what_was_done_and_found_is_marked_where_it_was():
    _, ax = plot_norms(made_up_run())

    lines = labelled(ax)
    where = {name: list(lines[name].get_xdata()) for name in list(lines)[2:]}
    assert where == {
        "step skipped": [200.0],
        "learning rate cut": [201.0],
        "vanishing in time": [120.0],
        "exploding": [200.0],
    }
    spans = [list(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert spans == [[90.0, 399.0], [200.0, 205.0]]  # open to the end, and healed
    heights = [lines[name].get_ydata()[0] for name in where]
    assert len(set(heights)) == len(heights)  # none covers another


def test_a_symptom_alone_is_not_marked():
    mild = tuple(replace(f, severity=Severity.INFO) for f in part().findings)
    _, ax = plot_norms(part(findings=mild, actions=()))

    assert set(labelled(ax)) == {"gradient norm", "clip threshold"}


def test_steps_that_are_not_finite_are_marked():
    steps = dict(part().steps)
    steps["total_norm"] = steps["total_norm"].copy()
    steps["total_norm"][[7, 9]] = math.nan, math.inf
    figure, ax = plot_norms(part(steps=steps))
    figure.savefig(io.BytesIO())

    assert list(labelled(ax)["norm not finite"].get_xdata()) == [7.0, 9.0]


def test_every_action_has_a_mark():
    assert set(_ACTIONS) == set(ActionKind)
    actions = tuple(Action(kind, 10 * n, "Done.") for n, kind in enumerate(ActionKind, 1))
    figure, ax = plot_norms(part(actions=actions))
    figure.savefig(io.BytesIO())

    assert {label for label, _ in _ACTIONS.values()} <= set(labelled(ax))


def test_the_loss_has_an_axis_of_its_own():
    run = made_up_run()
    figure, ax = plot_norms(run, loss=True)

    other = next(axes for axes in figure.axes if axes is not ax)
    np.testing.assert_array_equal(other.lines[0].get_ydata(), run.optimizers[0].steps["loss"])
    assert same_color(other.yaxis.label.get_color(), other.lines[0].get_color())
    assert len(plot_norms(run)[0].axes) == 1


def test_a_run_of_one_step_and_one_without_a_norm_can_be_drawn():
    plot_norms(made_up_run(1))[0].savefig(io.BytesIO())
    nothing = {name: np.full(3, math.nan) for name in part().steps} | {"step": np.arange(3.0)}
    plot_norms(part(steps=nothing), loss=True)[0].savefig(io.BytesIO())


@given(arrays.arrays(np.float64, st.integers(1, 3000), elements=NUMBERS), st.booleans())
def test_bins_keep_order_and_extremes(values, log):
    reduced = series(np.arange(float(len(values))), values, most=100, log=log)

    known = values[np.isfinite(values) & ((values > 0.0) | (not log))]
    assert len(reduced.steps) <= 200
    has = np.isfinite(reduced.middle)
    assert has.any() == bool(known.size)
    assert (reduced.low[has] <= reduced.middle[has] * (1 + 1e-9)).all()
    assert (reduced.middle[has] <= reduced.high[has] * (1 + 1e-9)).all()
    if known.size:
        assert np.nanmin(reduced.low) == known.min()
        assert np.nanmax(reduced.high) == known.max()


# -- layers ---------------------------------------------------------------------------------------


def test_the_heat_map_has_a_value_for_each_layer_and_step():
    run = made_up_run()
    _, ax = plot_layers(run)

    matrix = run.optimizers[0].layers
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), matrix.values.T)
    assert image.get_extent() == [0.0, 400.0, 5.5, -0.5]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(matrix.names)


def test_relative_updates_have_a_map_of_their_own():
    run = made_up_run()
    figure, ax = plot_layers(run, what="update_ratio")

    np.testing.assert_allclose(ax.images[0].get_array(), run.optimizers[0].updates.values.T)
    assert figure.axes[1].get_ylabel() == "relative update ‖ΔW‖/‖W‖"
    with pytest.raises(ValueError, match="what must be one of"):
        plot_layers(run, what="weights")


@pytest.mark.parametrize("layers", [1, 12, 200, 3000])
def test_names_can_be_read_at_any_number_of_layers(layers):
    figure, ax = plot_layers(made_up_run(50, layers))
    figure.savefig(io.BytesIO())

    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(one.y0 >= other.y1 for one, other in pairwise(boxes))
    assert min(layers, 12) <= len(boxes)
    assert boxes[0].x0 >= 0.0
    assert figure.get_size_inches()[1] <= 5.0


def test_long_names_leave_room_for_the_map():
    names = tuple(f"model.encoder.layers.{n}.self_attention.output_projection" for n in range(9))
    layers = replace(part().layers, names=names, values=np.ones((40, 9)))
    figure, ax = plot_layers(part(layers=layers))
    figure.savefig(io.BytesIO())

    assert ax.get_position().width > 0.35


def test_a_spike_does_not_take_all_the_colors():
    values = np.full((200, 5), 1e-3)
    values[:, 1] = 1e-2
    values[17, 3] = 1e12
    layers = LayerMatrix(tuple("abcde"), np.arange(200.0), values)
    _, ax = plot_layers(part(layers=layers))

    norm = ax.images[0].norm
    assert norm.vmin <= 1e-3
    assert norm.vmax <= 0.11


@given(
    st.integers(1, 30).flatmap(
        lambda steps: st.tuples(
            st.lists(st.integers(0, 5000), min_size=steps, max_size=steps, unique=True).map(sorted),
            arrays.arrays(
                np.float64,
                st.tuples(st.just(steps), st.integers(1, 12)),
                elements=NUMBERS,
            ),
        )
    )
)
def test_a_grid_holds_each_value_until_the_next(history):
    steps, values = np.array(history[0], dtype=np.float64), history[1]
    drawn = grid(steps, values, columns=6000, rows=100)

    positive = values[np.isfinite(values) & (values > 0.0)]
    if not positive.size:
        assert drawn is None
        return
    assert drawn is not None
    assert drawn.lowest < drawn.highest
    assert drawn.beyond in ("neither", "min", "max", "both")
    edges = np.linspace(*drawn.steps, drawn.logs.shape[1], endpoint=False)
    width = (drawn.steps[1] - drawn.steps[0]) / drawn.logs.shape[1]
    for at, row in zip(steps, values, strict=True):
        column = drawn.logs[:, int(np.searchsorted(edges, at + 1e-3 * width) - 1)]
        known = np.isfinite(row) & (row > 0.0)
        np.testing.assert_allclose(column[known], np.log10(row[known]), atol=1e-9)
        assert np.isnan(column[~np.isfinite(row)]).all()
        assert (column[row == 0.0] < np.log10(positive.min())).all()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 50), st.integers(1, 50))
def test_a_grid_is_of_the_size_that_was_asked_for(steps, layers, columns, rows):
    drawn = grid(np.arange(steps) * 7.0, np.ones((steps, layers)), columns=columns, rows=rows)

    assert drawn is not None
    assert drawn.logs.shape[0] <= rows
    assert drawn.logs.shape[1] <= columns
    assert drawn.logs.shape[0] == -(-layers // drawn.rows_each)
    assert np.isfinite(drawn.logs).all()


# -- timesteps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [50, 256, 1000])
@pytest.mark.parametrize("rate", [-0.1, 0.02])
def test_the_curve_goes_back_from_the_last_timestep(timesteps, rate):
    _, ax = plot_timesteps(part(times=(reading(rate, timesteps),)))

    curve, slope, dot = ax.lines
    back, norms = curve.get_data()
    np.testing.assert_allclose(norms, 2.0 * np.exp(rate * back))
    assert (np.diff(back) > 0.0).all()
    assert -0.5 <= back[0] < back[-1] <= timesteps
    x, y = slope.get_data()
    assert (np.log(y[1] / y[0]) / (x[1] - x[0])) == pytest.approx(rate)
    half = math.log(2.0) / abs(rate)
    assert dot.get_xdata()[0] == pytest.approx(back[0] + half)
    assert dot.get_ydata()[0] == pytest.approx(norms[0] * (0.5 if rate < 0 else 2.0))
    assert ax.get_ylim()[0] >= ax.get_ylim()[1] / 1e13


def test_a_reverse_direction_goes_the_other_way():
    norms = (4.0, 2.0, 1.0)
    back = TimeReading("rnn", "l0_reverse", "exact", timesteps=3, profile=norms)
    _, ax = plot_timesteps(part(times=(back,)))

    assert list(ax.lines[0].get_ydata()) == [4.0, 2.0, 1.0]
    assert "decay not known" in ax.lines[0].get_label()


def test_each_module_is_drawn_as_it_was_last_and_one_can_be_chosen():
    times = (reading(-0.5), reading(-0.1, step=9), reading(-0.3, module="decoder", part=""))
    _, ax = plot_timesteps(part(times=times))
    _, one = plot_timesteps(part(times=times), module="decoder")

    assert list(labelled(ax)) == ["rnn, half-life 6.9 steps", "decoder, half-life 2.3 steps"]
    assert list(labelled(one)) == ["decoder, half-life 2.3 steps"]
    with pytest.raises(ValueError, match="module must be one of 'rnn/l0', 'decoder', got 'lstm'"):
        plot_timesteps(part(times=times), module="lstm")


def test_several_readings_run_from_early_to_late():
    times = tuple(reading(-0.01 * n, step=10 * n) for n in range(1, 21))
    figure, ax = plot_timesteps(part(times=times), module="rnn", readings=4)

    slopes = [np.diff(np.log(line.get_ydata()))[0] for line in ax.lines[:4]]
    np.testing.assert_allclose(slopes, [-0.01, -0.07, -0.14, -0.2])
    assert figure.axes[1].get_ylabel() == "optimizer step"
    assert list(labelled(ax)) == ["rnn/l0, newest: half-life 3.5 steps"]

    two = (*times, reading(part="l1"))
    with pytest.raises(ValueError, match="module must name one of 'rnn/l0', 'rnn/l1'"):
        plot_timesteps(part(times=two), readings=4)


def test_many_modules_are_drawn_without_a_legend_as_long_as_the_page():
    times = tuple(reading(-0.02 * n, module=f"blocks.{n}") for n in range(1, 25))
    figure, ax = plot_timesteps(part(times=times))

    assert len(ax.lines) == 24
    assert labelled(ax) == {}
    assert figure.axes[1].get_ylabel().startswith("module")


def test_norms_that_are_zero_or_not_finite_leave_a_gap():
    gaps = TimeReading(
        "rnn", "", "input", timesteps=4, decay_rate=-1.0, profile=(0.0, math.nan, 1.0, math.inf)
    )
    figure, ax = plot_timesteps(part(times=(gaps,)))
    figure.savefig(io.BytesIO())

    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [math.nan, 1.0, math.nan, math.nan])
    assert "x$_t$" in ax.get_ylabel()
    with pytest.raises(ValueError, match="measured through time"):
        plot_timesteps(part(times=(replace(gaps, profile=(0.0, 0.0)),)))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_readings_is_a_whole_number(value, error):
    with pytest.raises(error, match="readings must be an integer >= 1"):
        plot_timesteps(made_up_run(), readings=value)
