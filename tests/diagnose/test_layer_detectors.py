"""What holds for every detector of inspections."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose import (
    DeadUnitsDetector,
    Detector,
    Diagnosis,
    Finding,
    NotTrainingDetector,
    Observation,
    Pathology,
    SaturationDetector,
    Severity,
    Thresholds,
    UnderflowDetector,
    UpdateRangeDetector,
    VanishingInDepthDetector,
    layer_detectors,
)
from lightning_gradguard.diagnose.layer_watch import MAX_PLACES
from lightning_gradguard.readings import (
    Inspection,
    ModelFacts,
    ParameterReading,
)
from tests.diagnose.layer_runs import (
    Run,
    bias,
    diagnose,
    facts,
    learning,
    looking,
    network,
    relu,
    run,
    stuck,
    weight,
)
from tests.diagnose.mixed_runs import ODDITIES, odd_look

KINDS = [type(detector) for detector in layer_detectors()]
# Each example is a whole run.
few = settings(max_examples=20)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
NAN = math.nan


def eventful(seed: int, n: int = 500, turned: bool = False) -> Run:
    """Layers that change in the middle of the run, beside a loss that may."""
    rng = random.Random(seed)
    one, two = (odd_look(rng, turned) for _ in range(2))
    change = rng.randrange(n)
    later = rng.choice([2.3, 5.0, 0.5])
    before = rng.choice([learning, lambda _: 2.3])
    losses = [(before(s) if s < change else later) + rng.gauss(0, 0.03) for s in range(n)]
    model = ModelFacts(precision=rng.choice(["16-mixed", "32", ""]), planned_steps=n)
    return run(
        lambda s: one if s < change else two, losses.__getitem__, every=rng.choice([10, 50]), n=n,
        model=model,
    )  # fmt: skip


def changed(steps: Run, change: Callable[[ParameterReading], ParameterReading]) -> Run:
    return [
        step
        if step.inspection is None
        else replace(
            step,
            inspection=replace(
                step.inspection, parameters=tuple(map(change, step.inspection.parameters))
            ),
        )
        for step in steps
    ]


def test_layer_detectors_are_new_and_in_order() -> None:
    first, second = layer_detectors(), layer_detectors()
    assert [
        NotTrainingDetector,
        UnderflowDetector,
        DeadUnitsDetector,
        SaturationDetector,
        VanishingInDepthDetector,
        UpdateRangeDetector,
    ] == KINDS
    assert all(a is not b for a, b in zip(first, second, strict=True))


def test_thresholds_reach_every_detector() -> None:
    names = ("layer_persistence", "fact_persistence", "zero_gradient_persistence")
    patient = layer_detectors(Thresholds(**dict.fromkeys(names, 100)))
    steps = [s for seed in range(10) for s in eventful(seed)]
    assert diagnose(steps[:500], patient) == []


def test_eventful_runs_make_every_detector_speak() -> None:
    """Or the properties below would hold because nothing happens."""
    found = {(f.pathology, f.severity) for seed in range(60) for f in diagnose(eventful(seed))}
    kinds = {kind.pathology for kind in KINDS}
    assert found == {(p, s) for p in kinds for s in (Severity.INFO, Severity.WARNING)}


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not UnderflowDetector])
@few
@given(seed=st.integers(0, 10_000), exponent=st.floats(-12, 12))
def test_the_unit_of_the_gradient_alone_changes_no_finding(
    kind: type[Detector], seed: int, exponent: float
) -> None:
    steps = eventful(seed)
    scaled = changed(steps, lambda r: replace(r, grad_norm=10.0**exponent * r.grad_norm))
    assert facts(diagnose(scaled, [kind()])) == facts(diagnose(steps, [kind()]))


@pytest.mark.parametrize("kind", [SaturationDetector, UpdateRangeDetector])
@few
@given(seed=st.integers(0, 10_000))
def test_permuting_the_layers_permutes_the_findings(kind: type[Detector], seed: int) -> None:
    order = lambda f: (f.step, f.where, f.severity)  # noqa: E731
    found = diagnose(eventful(seed, turned=True), [kind()])
    assert sorted(found, key=order) == sorted(diagnose(eventful(seed), [kind()]), key=order)


@few
@given(seed=st.integers(0, 10_000))
def test_permuting_the_layers_changes_only_which_of_them_is_named(seed: int) -> None:
    """Where modules are told together, the first of them is named."""

    def told(findings: list[Finding]) -> list[tuple[Any, ...]]:
        return sorted((f.step, f.severity, sorted(f.evidence.items())) for f in findings)

    # What comes before a module that does not train is evidence too, so the other one is not here.
    found = diagnose(eventful(seed, turned=True), [UnderflowDetector()])
    assert told(found) == told(diagnose(eventful(seed), [UnderflowDetector()]))


@few
@given(shares=st.permutations([0.0, 0.3, 0.74, 0.8, 0.96]))
def test_dead_units_do_not_depend_on_their_neighbors(shares: list[float]) -> None:
    units = [relu(share, f"act.{share}") for share in shares]
    found = diagnose(run(looking(None, *units), stuck()))
    assert sorted(f.where for f in found) == ["act.0.8", "act.0.96"]


@pytest.mark.parametrize(
    "steps",
    [
        [],
        run(looking(), stuck(), 1),
        run(looking(), stuck()),
        run(looking(), lambda _: None),
        run(looking(), lambda _: 0.0),
        run(looking([]), stuck()),
        run(looking([bias("a.bias"), weight("a.weight")]), lambda _: NAN),
    ],
    ids=["empty", "one step", "stuck", "no loss", "zero", "no parameters", "NaN"],
)
def test_layers_in_good_order_give_no_finding(steps: Run) -> None:
    detectors = layer_detectors()
    assert diagnose(steps, detectors) == []
    assert not any(d.is_open(where) for d in detectors for where in ("model", "net.0", "a", ""))


def test_one_look_says_nothing() -> None:
    rng = random.Random(0)
    for _ in range(50):
        assert diagnose([Observation(0, 2.3, 1.0, inspection=odd_look(rng))]) == []


def test_an_inspection_that_is_given_twice_counts_once() -> None:
    look = Inspection(7, tuple(network({0: {"in_optimizer": False}})))
    steps = [Observation(step, 2.3, 1.0, inspection=look) for step in range(7, 40)]
    assert diagnose(steps) == []


def test_steps_that_are_counted_anew_do_not_stop_the_watch() -> None:
    good, bad = looking(), looking(network({2: {"update_ratio": 1e-8}}))
    detector = UpdateRangeDetector()
    steps = [*run(good, stuck(), 1000), *run(bad, stuck(), 200), *run(bad, stuck(), 200)]
    assert [f.severity for f in diagnose(steps, [detector])] == [Severity.WARNING]


def test_findings_come_with_the_step_of_the_observation_and_begin_with_the_inspection() -> None:
    bad = looking(network({2: {"update_ratio": 1e-8}}))
    (finding,) = diagnose(run(bad, stuck(), delay=3))
    assert (finding.step, finding.since) == (53, 0)


def test_an_episode_ends_after_as_many_calm_inspections_and_is_said_again() -> None:
    good, bad = looking(), looking(network({2: {"update_ratio": 1e-8}}))
    phases = run(lambda s: bad(s) if s // 400 != 1 else good(s), stuck(), 1200)
    diagnosis = Diagnosis([UpdateRangeDetector()])
    found = [f for step in phases for f in diagnosis.observe(step)]
    assert [(f.step, f.until) for f in found] == [(50, None), (50, 500), (900, None)]
    assert [f.pathology for f in diagnosis.open] == [Pathology.UPDATE_OUT_OF_RANGE]


def test_every_finding_is_open_until_healed_and_has_plain_words() -> None:
    for seed in range(60):
        for detector in layer_detectors():
            for step in eventful(seed):
                for finding in detector.observe(step):
                    assert detector.is_open(finding.where)
                    message = finding.message
                    place = "the model" if finding.where == "model" else f"`{finding.where}`"
                    assert place in message, message
                    assert message.isascii()
                    assert message.endswith(".")
                    assert message[0].isupper() or message[0] in "`0123456789"
                    assert any(c.isdigit() for c in message.replace(place, ""))
                    assert any(f", {word} " in message for word in ("so", "which", "while"))
                    assert len(message) < 220, message
                    assert "nan" not in message
                    assert finding.remedies == ()


def test_memory_is_bounded_over_many_steps_and_layers() -> None:
    detectors = layer_detectors()
    sizes = []
    for step in range(100_000):
        inspection = None
        if step % 10_000 in (0, 1, 50, 100):
            names = [f"net.{i + step // 10_000 * 300}" for i in range(700)]
            odd = ODDITIES[step // 10_000 % len(ODDITIES)]
            inspection = Inspection(
                step,
                tuple(weight(f"{name}.weight", **odd) for name in names),
                tuple(relu(0.8, name, saturated=0.8) for name in names),
                depth_slope=-2.0,
                depth_error=0.1,
                depth_layers=700,
            )
        observation = Observation(step, 2.3 + 0.01 * (step % 7), 1.0, inspection=inspection)
        for detector in detectors:
            detector.observe(observation)
        if step % 5000 == 4999:
            sizes.append(max(len(json.dumps(d.state_dict())) for d in detectors))
    places = [len(d.state_dict()["places"]) for d in detectors]
    assert max(places) <= MAX_PLACES
    # Per place its names and four marks; the modules that had a gradient; the blocks of the loss.
    assert max(sizes) < MAX_PLACES * 400 + 4096 * 12 + 8000


def test_cheap_steps_leave_nothing_behind() -> None:
    """Without inspections only the loss is followed, in blocks."""
    detector = NotTrainingDetector()
    sizes = set()
    for step in range(200_000):
        detector.observe(Observation(step, 2.0, 1.0))
        if step % 20_000 == 19_999:
            sizes.add(len(json.dumps(detector.state_dict())))
    assert max(sizes) - min(sizes) < 500
    assert max(sizes) < 20_000
