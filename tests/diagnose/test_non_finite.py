"""NaN and Inf: where they began, told from what was found by looking again or from the norms."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnose import (
    Diagnosis,
    Finding,
    NonFiniteDetector,
    Observation,
    Pathology,
    Severity,
    Thresholds,
)
from lightning_gradguard.diagnose.remedies import with_remedies
from lightning_gradguard.readings import ModelFacts, NonFiniteOrigin

NAMES = ("embed.weight", "rnn.weight_hh_l0", "rnn.bias_hh_l0", "norm.weight", "head.bias")
LOSSES = st.sampled_from([None, 0.5, math.nan, math.inf, -math.inf])


def norms(*bad: str, value: float = math.nan) -> dict[str, float]:
    return {name: value if name.partition(".")[0] in bad else 1.0 for name in NAMES}


def found(
    loss: float | None,
    total: float = math.nan,
    by_name: dict[str, float] | None = None,
    origin: NonFiniteOrigin | None = None,
) -> Finding:
    observation = Observation(7, loss, total, by_name, origin=origin)
    (finding,) = NonFiniteDetector().observe(observation)
    return finding


# -- from the norms -------------------------------------------------------------------------------


@given(last=st.integers(0, len(NAMES) - 1), value=st.sampled_from([math.nan, math.inf]))
def test_under_a_finite_loss_it_is_the_last_module(last: int, value: float) -> None:
    """The gradient comes from the loss and poisons all that is nearer to the input."""
    by_name = {name: value if n <= last else 1.0 for n, name in enumerate(NAMES)}
    finding = found(0.5, value, by_name)
    assert finding.where == NAMES[last].rpartition(".")[0]
    assert finding.evidence["non_finite_parameters"] == last + 1
    assert f"({last + 1} of {len(NAMES)} parameters)" in finding.message


def test_not_the_first_of_all() -> None:
    assert found(0.5, math.nan, norms("embed", "rnn")).where == "rnn"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_under_a_loss_that_is_not_finite_norms_cannot_tell(loss: float) -> None:
    assert found(loss, math.nan, norms("embed", "rnn", "norm", "head")).where == "model"
    assert found(loss, 1.0).where == "loss"


def test_of_a_loss_that_is_not_known_it_depends() -> None:
    assert found(None, math.nan, norms("embed", "rnn")).where == "rnn"
    assert found(None, math.nan, norms("embed", "rnn", "norm", "head")).where == "model"
    assert found(None, math.nan).where == "model"


# -- from looking again ---------------------------------------------------------------------------

PLACES = [
    (NonFiniteOrigin("batch", "inputs", 3, 2), "batch", "The batch of step 7 holds NaN or Inf in"),
    (NonFiniteOrigin("batch", "", 3, 2), "batch", "The batch of step 7 holds NaN or Inf, at"),
    (NonFiniteOrigin("weights", "rnn"), "rnn", "The weights of `rnn` hold"),
    (NonFiniteOrigin("weights"), "model", "The weights of the model hold"),
    (NonFiniteOrigin("forward", "rnn", 3, 2), "rnn", "first not finite in `rnn` at step 7"),
    (NonFiniteOrigin("forward", "", 3, 2), "model", "the model's own code outside its modules"),
    (NonFiniteOrigin("loss"), "loss", "The loss is NaN at step 7 although"),
    (NonFiniteOrigin("backward", "rnn", 3, 2), "rnn", "The backward pass is first not finite in"),
    (NonFiniteOrigin("backward", "", 3, 2), "model", "in the loss, before it reaches the model"),
]


@pytest.mark.parametrize(("origin", "where", "words"), PLACES)
def test_the_place_that_was_found_counts_more_than_the_norms(
    origin: NonFiniteOrigin, where: str, words: str
) -> None:
    loss = 0.5 if origin.place == "backward" else math.nan
    finding = found(loss, math.nan, norms("embed", "rnn", "norm", "head"), origin)
    assert (finding.where, finding.timestep) == (where, origin.timestep)
    assert words in finding.message
    assert ("timestep 3 of sample 2" in finding.message) == (origin.timestep == 3)
    assert finding.evidence.get("sample") == origin.sample
    assert finding.evidence.get("batch", 0.0) == float(origin.place == "batch")


ORIGINS = st.none() | st.builds(
    NonFiniteOrigin,
    st.sampled_from(["batch", "weights", "forward", "loss", "backward"]),
    st.sampled_from(["", "rnn", "encoder.layers.11.self_attn.out_proj"]),
    st.none() | st.integers(0, 100_000),
    st.none() | st.integers(0, 100_000),
)


@given(loss=LOSSES, bad=st.sets(st.sampled_from(["embed", "rnn", "norm", "head"])), origin=ORIGINS)
def test_every_finding_is_one_plain_sentence_and_a_fact(
    loss: float | None, bad: set[str], origin: NonFiniteOrigin | None
) -> None:
    total = math.nan if bad or loss is None or math.isfinite(loss) else 1.0
    finding = found(loss, total, norms(*bad), origin)
    message = finding.message
    assert re.fullmatch(r"The .+\.", message), message
    assert not re.search(r"[.!?]\s", message), message
    assert re.search(r"\d", message), message
    assert re.search(r", so ", message), message
    assert message.isascii()
    assert len(message) < 230, message
    assert finding.fact
    assert finding.certainty == "certain"
    assert finding.severity is Severity.CRITICAL
    assert finding.since == finding.step == 7
    assert all(math.isfinite(number) for number in finding.evidence.values())
    assert with_remedies(finding, ModelFacts()).remedies
    json.dumps(finding.to_dict(), allow_nan=False)


# -- as long as it lasts --------------------------------------------------------------------------


def test_weights_that_are_lost_for_good_are_one_finding() -> None:
    diagnosis = Diagnosis([NonFiniteDetector()])
    first = Observation(0, 0.5, math.nan, norms("rnn"), origin=NonFiniteOrigin("forward", "rnn"))
    assert [f.where for f in diagnosis.observe(first)] == ["rnn"]
    for step in range(1, 200):
        lost = Observation(step, math.nan, math.nan, norms("embed", "rnn", "norm", "head"))
        assert diagnosis.observe(lost) == []
    assert [(f.pathology, f.where) for f in diagnosis.open] == [(Pathology.NON_FINITE, "rnn")]


def test_it_heals_and_the_next_one_is_told_anew() -> None:
    diagnosis, heal = Diagnosis([NonFiniteDetector()]), Thresholds().heal_steps
    told = []
    for step in range(2 * heal + 2):
        bad = step in (0, heal + 1)
        told += diagnosis.observe(Observation(step, math.nan if bad else 1.0, 1.0))
    assert [(f.since, f.until) for f in told] == [
        (0, None),
        (0, heal),
        (heal + 1, None),
        (heal + 1, 2 * heal + 1),
    ]
