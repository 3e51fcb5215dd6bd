"""All detectors together: one finding per cause."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnose import (
    Diagnosis,
    Finding,
    Observation,
    Pathology,
    Severity,
    by_cause,
    default_detectors,
)
from lightning_gradguard.diagnose.diagnosis import _EXPLAINS


class Scripted:
    """Finds what its script says, and is open from the first finding until the step it names.

    Args:
        pathology: What it finds.
        script: Severity by step.
        heals: Step at which it is not open any more.
        where: The place.
        since: Step at which the symptom began; at the finding, if not given.
    """

    def __init__(
        self,
        pathology: Pathology,
        script: Mapping[int, Severity],
        heals: int = 10**9,
        where: str = "rnn",
        since: int | None = None,
    ) -> None:
        self.pathology, self.script, self.heals, self.where = pathology, script, heals, where
        self.since = since
        self._step = -1

    def observe(self, observation: Observation) -> list[Finding]:
        self._step = observation.step
        severity = self.script.get(observation.step)
        if severity is None:
            return []
        text = "The gradient of `rnn` is 3 times too small, so it learns nothing."
        found = Finding(self.pathology, severity, self.where, observation.step, {"n": 1.0}, text)
        return [replace(found, since=self.since)]

    def is_open(self, where: str) -> bool:
        return where == self.where and self._step < self.heals

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]

    def reset(self) -> None:
        self._step = -1


class Vanishing(Scripted):
    """Of a class of its own, as every real detector is: states are kept by class."""


def run(diagnosis: Diagnosis, steps: range) -> list[Finding]:
    return [f for step in steps for f in diagnosis.observe(Observation(step, 1.0, 1.0))]


def test_a_finding_opens_turns_worse_and_heals_as_one() -> None:
    script = {3: Severity.INFO, 5: Severity.WARNING}
    diagnosis = Diagnosis([Scripted(Pathology.STAGNATING, script, heals=9)])
    changes = run(diagnosis, range(20))
    assert [(f.step, f.severity, f.since, f.until) for f in changes] == [
        (3, Severity.INFO, 3, None),
        (5, Severity.WARNING, 3, None),
        (5, Severity.WARNING, 3, 9),
    ]
    assert diagnosis.open == []


def test_an_open_cause_explains_what_comes_later() -> None:
    diagnosis = Diagnosis(
        [Scripted(Pathology.STAGNATING, {6: Severity.WARNING}, where="loss")],
        [Vanishing(Pathology.VANISHING_IN_TIME, {2: Severity.WARNING})],
    )
    cause, effect = run(diagnosis, range(8))
    assert effect.follows_from == "vanishing_in_time in rnn"
    assert not cause.follows_from
    assert (cause.local, effect.local) == (True, False)
    assert diagnosis.open == [cause, effect]


def test_a_cause_that_is_found_later_is_told_of_the_effect() -> None:
    diagnosis = Diagnosis(
        [Scripted(Pathology.STAGNATING, {1: Severity.WARNING}, where="loss")],
        [Vanishing(Pathology.VANISHING_IN_TIME, {4: Severity.WARNING}, since=0)],
    )
    first, cause, effect = run(diagnosis, range(6))
    assert first.follows_from == ""
    assert cause.pathology is Pathology.VANISHING_IN_TIME
    assert effect == diagnosis.open[1]
    assert effect.follows_from == "vanishing_in_time in rnn"
    assert effect.step == first.step == 1


def test_what_began_later_explains_nothing() -> None:
    diagnosis = Diagnosis(
        [Scripted(Pathology.STAGNATING, {1: Severity.WARNING}, where="loss")],
        [Vanishing(Pathology.VANISHING_IN_TIME, {4: Severity.WARNING}, since=3)],
    )
    assert [f.follows_from for f in run(diagnosis, range(6))] == ["", ""]


def test_a_harmless_symptom_explains_nothing() -> None:
    diagnosis = Diagnosis(
        [
            Scripted(Pathology.STAGNATING, {6: Severity.WARNING}, where="loss"),
            Vanishing(Pathology.VANISHING_IN_TIME, {2: Severity.INFO}),
        ]
    )
    assert [f.follows_from for f in run(diagnosis, range(8))] == ["", ""]


def test_no_two_pathologies_explain_each_other() -> None:
    order = list(Pathology)
    for cause, effects in _EXPLAINS.items():
        assert all(order.index(cause) < order.index(effect) for effect in effects)


@given(cut=st.integers(0, 120))
def test_a_restored_state_continues_identically(cut: int) -> None:
    def losses(step: int) -> float:
        return math.nan if step in (20, 21, 70) else 1.0 + (step > 90) * (step - 90)

    def feed(diagnosis: Diagnosis, steps: range) -> list[Finding]:
        seen = [Observation(step, losses(step), losses(step)) for step in steps]
        return [finding for one in seen for finding in diagnosis.observe(one)]

    whole, first, second = (Diagnosis(default_detectors()) for _ in range(3))
    expected = feed(whole, range(120))
    head = feed(first, range(cut))
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert head + feed(second, range(cut, 120)) == expected
    assert second.state_dict() == whole.state_dict()
    assert any(finding.until is not None for finding in expected)


def test_reset_forgets_everything() -> None:
    diagnosis = Diagnosis(default_detectors())
    diagnosis.observe(Observation(0, math.nan, math.nan))
    assert diagnosis.open
    diagnosis.reset()
    assert diagnosis.state_dict() == Diagnosis(default_detectors()).state_dict()


def test_the_serious_and_the_cause_are_read_first() -> None:
    def finding(pathology: Pathology, severity: Severity, **rest: Any) -> Finding:
        return Finding(pathology, severity, "loss", 1, {}, "", **rest)

    in_order = [
        finding(Pathology.UNDERFLOW, Severity.WARNING),
        finding(Pathology.STAGNATING, Severity.WARNING),
        finding(Pathology.DEAD_UNITS, Severity.CRITICAL, follows_from="underflow in model"),
        finding(Pathology.NON_FINITE, Severity.INFO),
    ]
    assert by_cause(in_order[::-1]) == in_order
