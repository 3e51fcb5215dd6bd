"""Scores of hand-made runs, their intervals, and the step at which ours became a warning."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.detection.cases import failing_cases
from benchmarks.detection.judging import OURS, Claim, JudgedRun, judge
from benchmarks.detection.records import Alarm, RunResult
from benchmarks.detection.replay import Cache, follow, replay
from benchmarks.detection.scoring import (
    COIN,
    decide,
    flip_coins,
    is_at,
    measure,
    rate_certainty,
    score,
)
from benchmarks.detection.sensitivity import variations
from benchmarks.detection.statistics import Bootstrap, estimate, ratio
from lightning_gradguard.diagnose import (
    Diagnosis,
    Finding,
    Observation,
    Pathology,
    Severity,
    Thresholds,
)

HEALTHY = JudgedRun("twin", "a", 0, 1000, 0.9, "healthy", (), (), 0, {OURS: []})
FAILING = JudgedRun(
    "sick", "a", 0, 1000, 0.1, "failing", ("exploding", "diverging"), ("rnn",), 400, {OURS: []}
)
RIGHT = Claim(450, "exploding", "rnn.weight_hh_l0", "grew", "likely")
EARLY = Claim(100, "exploding", "rnn")
WRONG = Claim(500, "stagnating", "head")


def said(run: JudgedRun, *claims: Claim, **changes) -> JudgedRun:
    return replace(run, claims={OURS: list(claims)}, **changes)


def of(runs: list[JudgedRun]) -> dict[str, float | None]:
    verdicts = [decide(run, run.claims[OURS]) for run in runs]
    metrics = measure(runs, verdicts, Bootstrap(runs, resamples=20))
    return {name: entry["value"] for name, entry in metrics.items()}


def test_a_run_is_detected_only_from_the_onset_on() -> None:
    right = decide(FAILING, [RIGHT])
    assert (right.detected, right.predicted, right.delay, right.placed, right.false_alarms) == (
        True,
        "exploding",
        0.05,
        True,
        0,
    )
    early = decide(FAILING, [EARLY])
    assert (early.detected, early.predicted, early.false_alarms, early.accused) == (
        False,
        "healthy",
        1,
        True,
    )
    both = decide(FAILING, [EARLY, RIGHT])
    assert (both.detected, both.false_alarms, both.accused) == (True, 1, False)


def test_any_of_the_causes_counts_as_the_label_and_nothing_else_does() -> None:
    assert decide(FAILING, [replace(RIGHT, cause="diverging")]).predicted == "exploding"
    assert decide(FAILING, [WRONG, RIGHT]).predicted == "stagnating"
    assert decide(FAILING, [replace(RIGHT, cause="")]).predicted == "unnamed"


def test_the_delay_is_that_of_the_first_alarm_not_of_the_named_one() -> None:
    verdict = decide(FAILING, [RIGHT, replace(WRONG, step=420)])
    assert verdict.predicted == "exploding"
    assert verdict.delay == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("place", "layers", "expected"),
    [
        ("rnn", ("rnn",), True),
        ("rnn.weight_hh_l0", ("rnn",), True),
        ("rnn/l0", ("rnn",), True),
        ("encoder", ("encoder.rnn",), True),
        ("rnn2", ("rnn",), False),
        ("", ("rnn",), False),
        ("head", ("rnn", "head"), True),
    ],
)
def test_places(place, layers, expected) -> None:
    assert is_at(place, layers) == expected


def test_metrics_of_a_few_runs() -> None:
    runs = [
        said(FAILING, RIGHT),
        said(FAILING, replace(WRONG, step=600), seed=1),
        said(FAILING, seed=2),
        said(FAILING, EARLY, seed=3),
        said(HEALTHY, WRONG, replace(WRONG, step=700), program="loud"),
        said(HEALTHY, seed=1),
    ]
    metrics = of(runs)
    assert metrics["precision"] == pytest.approx(2 / 4)
    assert metrics["recall"] == pytest.approx(2 / 4)
    assert metrics["f1"] == pytest.approx(4 / 8)
    assert metrics["cause"] == pytest.approx(1 / 2)
    assert metrics["place"] == pytest.approx(1 / 2)
    # "exploding": 1 right of 4 labels and 1 guess; "healthy": 1 right of 2 labels and 3 guesses
    assert metrics["macro_f1"] == pytest.approx((2 / 5 + 2 / 5) / 2)
    # two in a healthy run and one before the onset, in 2 x 1000 and 4 x 400 steps
    assert metrics["false_alarms"] == pytest.approx(1000 * 3 / 3600, abs=1e-5)
    assert metrics["delay"] == pytest.approx((0.05 + 0.2) / 2)


def test_a_perfect_detector_has_perfect_scores_in_every_resample() -> None:
    runs = [
        said(run, *claims, family=family, program=f"{run.program}_{family}", seed=seed)
        for family in "abc"
        for seed in range(3)
        for run, claims in ((FAILING, [RIGHT]), (HEALTHY, []))
    ]
    entry = measure(runs, [decide(r, r.claims[OURS]) for r in runs], Bootstrap(runs, resamples=200))
    for name in ("precision", "recall", "f1", "cause", "macro_f1", "place"):
        assert entry[name] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_where_there_is_nothing_to_divide_by_there_is_no_number() -> None:
    metrics = of([said(HEALTHY)])
    assert metrics["precision"] is None
    assert metrics["recall"] is None
    assert metrics["delay"] is None
    assert metrics["false_alarms"] == 0.0
    assert score([])["detectors"][OURS]["f1"]["value"] is None


def test_families_are_resampled_whole_and_seeds_within_them() -> None:
    runs = [
        replace(run, family=family, seed=seed, program=f"{run.program}_{family}")
        for family in "abcd"
        for seed in range(5)
        for run in (FAILING, HEALTHY)
    ]
    weights = Bootstrap(runs, resamples=500).weights
    assert (weights[0] == 1).all()
    # a program and its twin with the same seed always count the same
    np.testing.assert_array_equal(weights[:, 0::2], weights[:, 1::2])
    # as many draws as there are families, each with as many seeds as it has
    of_family = weights[1:].reshape(500, 4, 10).sum(axis=2)
    assert (of_family.sum(axis=1) == 40).all()
    assert set(np.unique(of_family)) <= {0.0, 10.0, 20.0, 30.0, 40.0}
    # seeds within a family differ, or it would be a bootstrap over families alone
    assert (weights[1:, 0] != weights[1:, 2]).any()


def test_the_bootstrap_is_the_same_every_time() -> None:
    runs = [replace(FAILING, family=f, seed=s) for f in "ab" for s in range(3)]
    np.testing.assert_array_equal(Bootstrap(runs).weights, Bootstrap(runs).weights)


def test_an_interval_of_a_share_is_about_as_wide_as_theory_says() -> None:
    runs = [replace(FAILING, family=str(f), program=str(f)) for f in range(100)]
    bootstrap = Bootstrap(runs)
    entry = estimate(ratio(bootstrap.sums([n < 50 for n in range(100)]), bootstrap.sums([1] * 100)))
    assert entry["value"] == 0.5
    assert entry["low"] == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert entry["high"] == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_weighted_medians_are_those_of_the_repeated_values(values: list[float]) -> None:
    runs = [replace(FAILING, family=str(n)) for n in range(len(values))]
    bootstrap = Bootstrap(runs, resamples=20)
    medians = bootstrap.medians(values, range(len(values)))
    for median, weights in zip(medians, bootstrap.weights, strict=True):
        by_family = [weights[n] for n in range(len(values))]
        repeated = np.repeat(values, np.array(by_family, dtype=int))
        assert median == pytest.approx(np.median(repeated))


def test_the_coin_knows_the_base_rate_and_nothing_else() -> None:
    runs = [replace(FAILING, program=f"sick_{n}") for n in range(300)]
    runs += [replace(HEALTHY, program=f"twin_{n}") for n in range(700)]
    flips = flip_coins(runs)
    assert flips == flip_coins(runs)
    assert sum(map(bool, flips)) == pytest.approx(300, abs=60)
    assert sum(map(bool, flips[:300])) == pytest.approx(90, abs=35)
    assert {claim.cause for claims in flips for claim in claims} == {"exploding"}


def test_ambiguous_runs_are_left_out_and_counted() -> None:
    runs = [said(FAILING, RIGHT), said(HEALTHY, label="ambiguous", program="unclear")]
    scores = score([*runs, said(HEALTHY)])
    assert scores["runs"]["ambiguous"] == 1
    assert scores["runs"]["ambiguous_runs"] == {"unclear": 1}
    assert scores["detectors"][OURS]["f1"]["value"] == 1.0
    assert set(scores["detectors"]) == {OURS, COIN}
    assert scores["confusion"][OURS] == {
        "exploding": {"exploding": 1},
        "healthy": {"healthy": 1},
    }
    assert failing_cases(runs) == []


def test_cost_is_the_time_added_to_the_bare_runs() -> None:
    runs = [
        replace(FAILING, seconds={"run": 10.0, "guard": 1.0, "features": 5.0}),
        replace(HEALTHY, seconds={"run": 30.0, "guard": 1.0, "features": 5.0}),
    ]
    scores = score(runs)
    assert scores["detectors"][OURS]["cost"]["value"] == pytest.approx(0.05)
    assert scores["features_cost"] == pytest.approx(0.25)
    assert scores["detectors"][COIN]["cost"]["value"] is None


def test_certainty_is_rated_by_what_was_right() -> None:
    fact = Claim(450, "non_finite", certainty="certain")
    effect = Claim(460, "stagnating", certainty="likely", independent=False)
    note = Claim(450, "exploding", certainty="possible")
    freeze = Claim(0, "layer_not_training", certainty="certain")
    runs = [
        replace(said(FAILING, fact, RIGHT, effect), notes=[note, replace(note, step=3), freeze]),
        replace(said(HEALTHY), notes=[note]),
    ]
    rates = rate_certainty(runs)
    # a fact that does no harm claims nothing
    assert rates["certain"] == {"findings": 1, "in_failing_runs": 1.0, "name_the_cause": 0.0}
    assert rates["likely"] == {"findings": 2, "in_failing_runs": 1.0, "name_the_cause": 1.0}
    assert rates["possible"]["findings"] == 3
    assert rates["possible"]["in_failing_runs"] == pytest.approx(1 / 3)


def test_cases_say_what_was_missed_false_misnamed_and_misplaced() -> None:
    runs = [
        replace(said(FAILING), notes=[replace(RIGHT, certainty="possible")]),
        said(FAILING, seed=1),
        said(FAILING, WRONG, seed=2),
        said(FAILING, replace(RIGHT, layer="head"), seed=3),
        said(HEALTHY, RIGHT),
        said(FAILING, RIGHT, seed=4),
    ]
    cases = {case["kind"]: case for case in failing_cases(runs)}
    assert {kind: case["seeds"] for kind, case in cases.items()} == {
        "missed": [0, 1],
        "false": [0],
        "misnamed": [2],
        "misplaced": [3],
    }
    assert cases["missed"]["said"] == {
        "exploding in rnn.weight_hh_l0": {"seed": 0, "step": 450, "message": "grew"}
    }
    assert list(cases["misnamed"]["said"]) == ["stagnating in head"]


class Scripted:
    """A detector that finds at each step what it is told to."""

    def __init__(self, script: dict[int, Severity]) -> None:
        self.script = script

    def observe(self, observation: Observation) -> list[Finding]:
        step = observation.step
        if step not in self.script:
            return []
        return [Finding(Pathology.EXPLODING, self.script[step], "model", step, {}, "grew")]

    def is_open(self, where: str) -> bool:
        return True


def _observations() -> list[Observation]:
    """Calm, but for some steps."""
    return [Observation(step, math.nan if step in (10, 60) else 1.0, 1.0) for step in range(100)]


def _result(observations: list[Observation], **changes) -> RunResult:
    values = {
        "program": "sick",
        "family": "a",
        "seed": 0,
        "steps": 200,
        "score": math.nan,
        "label": "failing",
        "causes": ("exploding",),
        "layers": (),
        "onset": 100,
        "findings": [],
        "alarms": {"peer": [Alarm(7, "exploding"), Alarm(3, "stagnating", "head")]},
        "observations": observations,
    }
    return RunResult(**{**values, **changes})


def test_a_replay_knows_when_a_finding_became_a_warning() -> None:
    turns = {20: Severity.INFO, 40: Severity.WARNING, 70: Severity.CRITICAL}
    (warned,) = follow(Diagnosis([Scripted(turns)]), _observations())
    assert warned.finding.step == 70
    assert warned.step == 40
    (note,) = follow(Diagnosis([Scripted({20: Severity.INFO})]), _observations())
    assert note.step is None


def test_an_episode_that_healed_is_another_finding_than_the_next_one() -> None:
    found = [w for w in replay(_observations()) if w.finding.pathology == Pathology.NON_FINITE]
    assert [w.step for w in found] == [10, 60]
    claims = judge(_result(_observations())).claims[OURS]
    assert [claim.step for claim in claims if claim.cause == "non_finite"] == [10, 60]


def test_findings_count_as_they_are_where_nothing_was_recorded() -> None:
    serious = Finding(Pathology.EXPLODING, Severity.WARNING, "model", 150, {}, "grew")
    note = Finding(Pathology.SATURATED, Severity.INFO, "tanh", 120, {}, "saturated")
    run = judge(_result([], findings=[note, serious]))
    assert run.claims[OURS] == [Claim(150, "exploding", "", "grew", "likely")]
    assert run.notes == [Claim(120, "saturated", "tanh", "saturated", "possible")]
    assert [claim.step for claim in run.claims["peer"]] == [3, 7]


def test_a_run_that_found_something_else_than_its_replay_is_told() -> None:
    observations = _observations()
    true = [warned.finding for warned in replay(observations)]
    assert not judge(_result(observations, findings=true)).differs
    assert judge(_result(observations, findings=true[1:])).differs


def test_our_first_claim_is_the_cause_not_the_earliest() -> None:
    stuck = Finding(Pathology.STAGNATING, Severity.WARNING, "loss", 120, {}, "")
    short = Finding(Pathology.VANISHING_IN_TIME, Severity.WARNING, "rnn", 150, {}, "")
    run = judge(_result([], findings=[stuck, short]))
    assert [claim.cause for claim in run.claims[OURS]] == ["vanishing_in_time", "stagnating"]


def test_a_kept_run_comes_back_whole(tmp_path) -> None:
    cache = Cache(tmp_path / "runs")
    result = _result(_observations(), program="mlp_lr_/10000", seed=3, score=0.5)
    assert cache.load("mlp_lr_/10000", 3) is None
    cache.keep(result)
    kept = cache.load("mlp_lr_/10000", 3)
    assert kept is not None
    assert kept.alarms == result.alarms
    assert [o.step for o in kept.observations] == [o.step for o in result.observations]
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".pickle"]


def test_every_number_is_halved_and_doubled_as_far_as_is_allowed() -> None:
    defaults = Thresholds()
    varied = list(variations(defaults))
    names = {variation.name for variation in varied}
    # at least all but a count that cannot be halved, and shares that are already 1
    assert len(names) == len(vars(defaults))
    for variation in varied:
        default = getattr(defaults, variation.name)
        assert variation.value != default
        assert (variation.value > default) == (variation.factor > 1)
        assert getattr(variation.thresholds, variation.name) == variation.value
        assert isinstance(variation.value, int) or not isinstance(default, int)
    by_key = {(v.name, v.factor): v.value for v in varied}
    assert by_key["outlier_z", 2.0] == 12.0
    # doubled it would be 1.5, and a share is at most 1
    assert 0.75 < by_key["spike_share", 2.0] <= 1.0
