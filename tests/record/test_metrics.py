"""Keys and values that every logger takes."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.measure import layer_index
from lightning_gradguard.readings import Inspection, ParameterReading
from lightning_gradguard.record import StepRecord
from lightning_gradguard.record.metrics import (
    count_metrics,
    depth_within,
    inspection_metrics,
    layer_metrics,
    layer_updates,
    metric_key,
    step_metrics,
)

ROW = StepRecord(7, 1.5, 4.0, 2.0, 0.5, 0.03, 3, False, 0.25)
KEY = re.compile(r"[A-Za-z0-9_./]+\Z")
LABEL = st.sampled_from(["", "optimizer0", "my optimizer!"])


@given(parts=st.lists(st.text(), min_size=1))
def test_keys_hold_only_allowed_characters(parts: list[str]) -> None:
    key = metric_key(*parts)
    assert KEY.match(key) or not any(parts)


@given(layers=st.dictionaries(st.text(min_size=1), st.floats(), max_size=5), label=LABEL)
def test_so_do_those_of_layers(layers: dict[str, float], label: str) -> None:
    metrics = layer_metrics(layers, label)
    assert all(KEY.match(key) for key in metrics)
    assert all(key.startswith("grad_norm/") for key in metrics)
    assert not set(metrics) & set(step_metrics(ROW, protecting=True, label=label))


def test_what_a_step_logs() -> None:
    assert step_metrics(ROW, protecting=False) == {"grad_norm/total": 4.0}
    assert step_metrics(ROW, protecting=True) == {
        "grad_norm/total": 4.0,
        "grad_norm/total_clipped": 2.0,
        "gradguard/clip_threshold": 2.0,
        "gradguard/clip_coef": 0.5,
        "gradguard/max_ratio": 0.03,
        "gradguard/capped_tensors": 3.0,
        "gradguard/lr_scale": 0.25,
    }


def test_every_value_is_a_float_even_if_it_is_not_finite() -> None:
    row = replace(ROW, total_norm=math.nan, clip_threshold=math.inf, clip_coef=1.0)
    assert all(type(value) is float for value in step_metrics(row, protecting=True).values())
    counts = {"skipped_steps": 2, "findings": 1, "clipped_steps": 5, "capped_steps": 6}
    assert all(type(value) is float for value in count_metrics(counts).values())


@pytest.mark.parametrize("protecting", [True, False])
def test_labels_keep_optimizers_apart(protecting: bool) -> None:
    seen: set[str] = set()
    for label in ("", "optimizer0", "optimizer1"):
        keys = {
            *step_metrics(ROW, protecting=protecting, label=label),
            *count_metrics({"skipped_steps": 2, "findings": 1}, label),
            *layer_metrics({"encoder": 1.0, "total": 2.0}, label),
        }
        assert not keys & seen
        seen |= keys
        assert all(label in key for key in keys)


def test_the_relative_update_of_a_layer_is_that_of_its_tensors_together() -> None:
    weight = ParameterReading("net.0.weight", 4, 2, weight_norm=3.0, update_ratio=0.02)
    bias = ParameterReading("net.0.bias", 4, 1, weight_norm=4.0, update_ratio=0.01)
    frozen = ParameterReading("net.1.weight", weight_norm=1.0)
    inspection = Inspection(0, (weight, bias, frozen), depth_slope=-0.5)
    metrics = inspection_metrics(inspection, layer_updates(inspection), "g")
    together = math.hypot(3.0 * 0.02, 4.0 * 0.01) / 5.0
    assert metrics == pytest.approx({"update_ratio/g/net.0": together, "grad_depth/g/slope": -0.5})
    assert all(KEY.match(key) for key in metrics)
    assert list(layer_updates(Inspection(0, (weight, bias)), depth=1)) == ["net"]
    assert inspection_metrics(Inspection(0), {}) == {}


def names_of(*widths: int) -> list[str]:
    """Of a tree of modules with so many children at each level."""
    paths = [()]
    for width in widths:
        paths = [(*path, str(child)) for path in paths for child in range(width)]
    return [".".join((*path, name)) for path in paths for name in ("weight", "bias")]


def test_layers_are_as_deep_as_there_is_room_for() -> None:
    names = names_of(2, 12, 10)
    assert depth_within(names) is None
    assert depth_within(names, most=239) == 2
    assert depth_within(names, most=24) == 2
    assert depth_within(names, most=23) == 1
    assert depth_within(names, most=1) == 1
    assert depth_within([]) is None


@given(widths=st.lists(st.integers(1, 6), max_size=4), most=st.integers(1, 300))
def test_the_depth_is_the_largest_that_keeps_the_bound(widths: list[int], most: int) -> None:
    names = names_of(*widths)
    depth = depth_within(names, most)
    layers = len(layer_index(names, depth)[0])
    if depth is None:
        assert layers <= most
    else:
        assert layers <= most or depth == 1
        assert len(layer_index(names, depth + 1)[0]) > most
