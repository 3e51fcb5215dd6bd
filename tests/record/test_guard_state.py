"""What is said of the last steps in a word or two."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.record import StepRecord
from lightning_gradguard.record.guard_state import STATE_STEPS, guard_state

CALM = StepRecord(
    step=0,
    loss=0.5,
    total_norm=1.0,
    clip_threshold=4.0,
    clip_coef=1.0,
    max_ratio=0.1,
    capped_tensors=0,
    skipped=False,
    lr_scale=1.0,
)


def rows(count: int, start: int = 200, **changed):
    return [replace(CALM, step=start + number, **changed) for number in range(count)]


CLIPPED = {"clip_coef": 0.5}
SKIPPED = {"skipped": True, "clip_coef": 0.0, "total_norm": math.nan}

ROWS = st.lists(
    st.builds(
        StepRecord,
        step=st.integers(0, 1000),
        loss=st.none() | st.floats(),
        total_norm=st.floats(),
        clip_threshold=st.floats(0.0),
        clip_coef=st.floats(0.0, 1.0),
        max_ratio=st.floats(0.0),
        capped_tensors=st.integers(0, 9),
        skipped=st.booleans(),
        lr_scale=st.floats(1 / 64, 1.0),
    ),
    max_size=25,
)


@pytest.mark.parametrize(
    ("steps", "state"),
    [
        ([], "starting"),
        (rows(10), "ok"),
        (rows(10, **CLIPPED), "clipping"),
        (rows(5) + rows(5, **CLIPPED), "ok"),  # half of them: not yet the usual thing
        (rows(4) + rows(6, **CLIPPED), "clipping"),
        (rows(10, capped_tensors=3), "capping"),
        (rows(10, start=0, capped_tensors=3), "capping"),  # put back, and held from there on
        (rows(9, **CLIPPED) + rows(1, lr_scale=0.25), "backing off ×0.25"),
        (rows(10, lr_scale=0.5**0.5), "backing off ×0.71"),
        (rows(10, lr_scale=1 / 64), "backing off ×0.016"),
        (rows(5, lr_scale=0.25) + rows(5), "ok"),  # it has recovered
        (rows(1, **SKIPPED) + rows(9, lr_scale=0.25), "skipping"),
    ],
)
def test_state_is_what_matters_most_of_the_last_steps(steps, state):
    assert guard_state(steps) == state


def test_a_skip_is_named_as_long_as_it_is_among_the_last_steps():
    states = [guard_state(rows(1, **SKIPPED) + rows(count)) for count in range(20)]

    assert states == ["skipping"] * STATE_STEPS + ["ok"] * (20 - STATE_STEPS)


def test_who_only_observes_watches_and_says_what_is_not_finite():
    broken, by_scaler = rows(1, total_norm=math.inf), rows(1, **SKIPPED)

    assert guard_state(rows(10), protecting=False) == "watching"
    assert guard_state(broken + rows(3), protecting=False) == "not finite"
    assert guard_state(by_scaler + rows(3), protecting=False) == "watching"


@given(ROWS, st.booleans())
def test_only_the_last_steps_count_and_the_words_stay_short(steps, protecting):
    state = guard_state(steps, protecting=protecting)

    assert state == guard_state(steps[-STATE_STEPS:], protecting=protecting)
    assert 0 < len(state) <= len("backing off ×0.016")
