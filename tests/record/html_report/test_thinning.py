"""What is left out of a chart is nothing that its reader would miss."""

from __future__ import annotations

import base64

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.html_report.encoding import plotly_text, quantized
from lightning_gradguard.record.html_report.layer_table import MAX_ROWS, layer_rows
from lightning_gradguard.record.html_report.thinning import thin_line, thin_matrix
from lightning_gradguard.record.html_report.time_charts import time_charts
from lightning_gradguard.record.run_history import LayerMatrix, OptimizerHistory

VALUES = st.floats(width=32) | st.just(float("nan"))


@given(arrays.arrays(np.float64, st.integers(1, 400), elements=VALUES), st.integers(1, 50))
def test_a_line_keeps_its_extremes_and_its_order(values: np.ndarray, buckets: int) -> None:
    steps = np.arange(len(values)) * 3.0
    at, shown = thin_line(steps, values, buckets)

    assert len(at) <= max(2 * buckets, 2)
    assert (np.diff(at) > 0).all()
    finite = values[np.isfinite(values)]
    assert not np.isinf(shown).any()
    if finite.size:
        assert np.nanmin(shown) == finite.min()
        assert np.nanmax(shown) == finite.max()
    for step, value in zip(at, shown, strict=True):
        original = values[int(step) // 3]
        assert value == original or (np.isnan(value) and not np.isfinite(original))


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 60), st.integers(1, 40)), elements=VALUES),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_a_matrix_keeps_its_largest_cell(values: np.ndarray, rows: int, columns: int) -> None:
    count, layers = values.shape
    names = tuple(f"layer{number}" for number in range(layers))
    small = thin_matrix(
        LayerMatrix(names, np.arange(count) * 1.0, values), rows=rows, columns=columns
    )

    assert small.values.shape == (len(small.steps), len(small.names))
    assert small.values.shape[0] <= columns
    assert small.values.shape[1] <= rows
    assert np.array_equal(
        np.fmax.reduce(values, axis=None), np.fmax.reduce(small.values, axis=None), equal_nan=True
    )
    assert small.names[0].startswith("layer0")
    assert small.names[-1].endswith(f"layer{layers - 1}")


@given(arrays.arrays(np.float64, (5, 7), elements=st.floats(-40, 40) | st.just(float("nan"))))
def test_a_heat_map_comes_back_to_within_half_a_code(values: np.ndarray) -> None:
    coded = quantized(values)
    codes = np.frombuffer(base64.b64decode(coded["codes"]), np.uint8).reshape(5, coded["columns"])
    part = (coded["high"] - coded["low"]) / 254
    back = np.where(codes == 255, np.nan, coded["low"] + codes * part)

    np.testing.assert_allclose(back, values, atol=0.5 * part + 1e-9)


@given(st.text())
def test_plotly_finds_no_markup_in_a_name(text: str) -> None:
    shown = plotly_text(text, 20).replace("<br>", "")
    assert "<" not in shown
    assert ">" not in shown


def test_of_very_many_layers_the_table_keeps_those_that_stand_out() -> None:
    generator = np.random.default_rng(0)
    values = np.exp(generator.normal(0.0, 0.1, (20, 3 * MAX_ROWS)))
    values[:, 1234] = 1e-9
    names = tuple(f"layer{number}" for number in range(values.shape[1]))
    rows = layer_rows(OptimizerHistory(layers=LayerMatrix(names, np.arange(20.0), values)))

    assert len(rows) == MAX_ROWS
    assert "layer1234" in {row.name for row in rows}
    assert [row.name for row in rows] == sorted((r.name for r in rows), key=lambda n: int(n[5:]))


def test_layers_without_any_value_are_in_the_table() -> None:
    values = np.full((12, 2), np.nan)
    values[:, 0] = np.inf
    part = OptimizerHistory(layers=LayerMatrix(("a", "b"), np.arange(12.0), values))
    a, b = layer_rows(part)
    assert a.largest == np.inf
    assert np.isnan(b.median)


NORMS = st.floats(min_value=0.0) | st.just(float("nan"))


@given(
    st.lists(st.lists(NORMS, min_size=1, max_size=30), min_size=1, max_size=4),
    st.floats(-50, 50) | st.just(float("nan")),
    st.sampled_from(["l0", "l0_reverse", ""]),
)
def test_any_curve_can_be_drawn(profiles: list[list[float]], rate: float, part: str) -> None:
    readings = tuple(
        TimeReading(
            "rnn", part, "exact", timesteps=len(p), decay_rate=rate, profile=tuple(p), step=step
        )
        for step, p in enumerate(profiles)
    )
    for _, (curve, over_run) in time_charts("o", OptimizerHistory(times=readings), 1000):
        assert curve.caption
        for trace in curve.figure["data"][1:]:
            assert np.isfinite([*trace["x"], *trace["y"]]).all()
        assert np.isfinite(over_run.figure["data"][0]["z"]["low"])


def test_the_reverse_direction_runs_the_other_way() -> None:
    profile = (4.0, 2.0, 1.0)
    for part, first in (("l0", 1.0), ("l0_reverse", 4.0)):
        reading = TimeReading("rnn", part, "exact", timesteps=3, decay_rate=-0.7, profile=profile)
        ((_, (curve, _)),) = time_charts("o", OptimizerHistory(times=(reading,)), 1000)
        assert np.frombuffer(base64.b64decode(curve.figure["data"][0]["y"]["bdata"]))[0] == first
