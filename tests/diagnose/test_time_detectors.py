"""What holds for both detectors of the gradient through time."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose import (
    Finding,
    Observation,
    Pathology,
    Severity,
    TimeDetector,
    TimeExplosionDetector,
    VanishingInTimeDetector,
    time_detectors,
)
from lightning_gradguard.diagnose.time_watch import MAX_PARTS
from lightning_gradguard.readings import TimeReading
from tests.diagnose.mixed_runs import parts
from tests.diagnose.time_runs import (
    Run,
    diagnose,
    reading,
    run,
)

KINDS = [TimeExplosionDetector, VanishingInTimeDetector]
# Each example is a whole run.
few = settings(max_examples=20)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def facts(findings: list[Finding]) -> list[tuple[str, str, str, int]]:
    return [(f.pathology.value, f.severity.label, f.where, f.step) for f in findings]


def eventful(seed: int, n: int = 500) -> Run:
    """Modules that stay as they are or change in the middle of the run, beside a loss that may."""
    rng = random.Random(seed)
    one, two = (parts(rng, 4) for _ in range(2))
    change = rng.randrange(n)
    later = rng.choice([2.3, 5.0, 0.5])
    losses = [(2.3 if s < change else later) + rng.gauss(0, 0.03) for s in range(n)]
    return run(lambda s: one if s < change else two, lambda s: losses[s], n)


def test_time_detectors_are_new_and_in_order() -> None:
    first, second = time_detectors(), time_detectors()
    assert [type(d) for d in first] == KINDS
    assert all(a is not b for a, b in zip(first, second, strict=True))


def test_eventful_runs_make_both_detectors_speak() -> None:
    """Or the properties below would hold because nothing happens."""
    found = {(f.pathology, f.severity) for seed in range(20) for f in diagnose(eventful(seed))}
    words = (Pathology.EXPLODING, Pathology.VANISHING_IN_TIME)
    assert found == {(p, s) for p in words for s in (Severity.INFO, Severity.WARNING)}


@every_kind
@few
@given(seed=st.integers(0, 10_000))
def test_permuting_the_modules_permutes_the_findings(kind: type[TimeDetector], seed: int) -> None:
    steps = eventful(seed)
    turned = [replace(s, time=s.time[::-1]) for s in steps]
    expected, found = diagnose(steps, [kind()]), diagnose(turned, [kind()])
    order = lambda f: (f.step, f.where, f.message)  # noqa: E731
    assert sorted(found, key=order) == sorted(expected, key=order)


@every_kind
@few
@given(seed=st.integers(0, 10_000))
def test_modules_do_not_touch_each_other(kind: type[TimeDetector], seed: int) -> None:
    steps = eventful(seed)
    apart = []
    for name in sorted({r.module for s in steps for r in s.time}):
        alone = [replace(s, time=tuple(r for r in s.time if r.module == name)) for s in steps]
        apart += diagnose(alone, [kind()])
    assert sorted(facts(apart)) == sorted(facts(diagnose(steps, [kind()])))


def test_memory_is_bounded_over_many_steps_and_modules() -> None:
    detectors = time_detectors()
    sizes = []
    for step in range(100_000):
        time: tuple[TimeReading, ...] = ()
        if step % 500 == 0:
            rate = -0.44 if step % 1000 else 0.1
            time = tuple(
                reading(rate, module=f"layers.{i + step % 5000}.rnn", part="l0_reverse")
                for i in range(600)
            )
        for detector in detectors:
            detector.observe(Observation(step, 2.3 + 0.01 * (step % 7), 1.0, None, time))
        if step % 5000 == 4999:
            sizes.append(max(len(json.dumps(d.state_dict())) for d in detectors))
    assert sum(len(d.state_dict()["parts"]) for d in detectors) == 2 * MAX_PARTS
    # Per part a name and three marks of three numbers; and once the blocks of the loss.
    assert max(sizes) < MAX_PARTS * 300 + 4000
