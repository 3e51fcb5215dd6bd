"""Readings of several batches as one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.dry_run.combine import combine_readings
from lightning_gradguard.readings import TimeReading

READING = TimeReading(
    "rnn",
    "l0",
    "exact",
    "lstm",
    timesteps=4,
    sequences=8,
    decay_rate=-0.5,
    decay_error=0.1,
    steps=3,
    recency=0.5,
    profile=(1.0, 2.0, 3.0, 4.0),
    entry=(0.0, 0.0, 0.0, 1.0),
    causes={"forget_gate": 0.6},
)


def test_one_batch_is_left_as_it_is() -> None:
    assert combine_readings([[READING]]) == (READING,)


@given(st.lists(st.floats(-3.0, 3.0), min_size=2, max_size=10))
def test_mean_and_interval_are_those_of_independent_batches(rates: list[float]) -> None:
    (reading,) = combine_readings([[replace(READING, decay_rate=rate)] for rate in rates])
    mean = sum(rates) / len(rates)
    variance = sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1)
    quantile = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 7: 2.4469, 8: 2.3646,
                9: 2.3060, 10: 2.2622}[len(rates)]  # fmt: skip
    expected = quantile * math.sqrt(variance / len(rates))
    assert reading.decay_rate == pytest.approx(mean, abs=1e-12)
    assert reading.decay_error == pytest.approx(expected, rel=2e-3, abs=1e-12)
    assert reading.sequences == 8 * len(rates)


def test_a_single_known_rate_keeps_its_own_interval_and_says_so() -> None:
    unknown = replace(READING, decay_rate=math.nan, decay_error=math.nan, steps=0, note="why")
    (reading,) = combine_readings([[unknown], [READING]])
    assert (reading.decay_rate, reading.decay_error, reading.steps) == (-0.5, 0.1, 3)
    assert reading.note == "in 1 of 2 batches: why"


def test_a_rate_that_no_batch_knows_keeps_its_reason() -> None:
    unknown = replace(READING, decay_rate=math.nan, decay_error=math.nan, note="why")
    (reading,) = combine_readings([[unknown], [unknown]])
    assert math.isnan(reading.decay_rate)
    assert reading.note == "why"


def test_profiles_and_entries_are_of_the_longest_sequences() -> None:
    shorter = replace(READING, timesteps=2, profile=(9.0, 9.0), entry=(0.5, 0.5), steps=1)
    other = replace(READING, profile=(1.0, 2.0, 3.0, 3.0), entry=(0.0, 0.0, 1.0, 0.0))
    (reading,) = combine_readings([[READING], [shorter], [other]])
    assert reading.timesteps == 4
    assert reading.profile == pytest.approx((1.0, 2.0, 3.0, math.sqrt(12.5)))
    assert reading.entry == (0.0, 0.0, 0.5, 0.5)
    assert reading.steps == 1


def test_profiles_of_vanished_gradients_do_not_become_zero() -> None:
    tiny = replace(READING, profile=(1e-200,) * 4)
    (reading,) = combine_readings([[tiny], [tiny]])
    assert reading.profile == pytest.approx((1e-200,) * 4, rel=1e-12)


def test_what_is_not_known_in_a_batch_does_not_count() -> None:
    other = replace(READING, recency=math.nan, causes={"forget_gate": 0.8}, entry=())
    (reading,) = combine_readings([[READING], [other]])
    assert reading.recency == 0.5
    assert reading.entry == READING.entry
    assert reading.causes == pytest.approx({"forget_gate": 0.7})


def test_layers_directions_and_ways_of_measuring_stay_apart() -> None:
    parts = [replace(READING, part="l0_reverse"), replace(READING, source="input"), READING]
    combined = combine_readings([parts, parts[:1]])
    assert [(r.part, r.source, r.sequences) for r in combined] == [
        ("l0_reverse", "exact", 16),
        ("l0", "input", 8),
        ("l0", "exact", 8),
    ]
