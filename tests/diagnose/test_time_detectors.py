"""What holds for both detectors of the gradient through time."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace

import pytest
import torch
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
from tests.diagnose.time_runs import (
    CAUSES,
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


def parts(rng: random.Random, modules: int) -> list[TimeReading]:
    """Readings of some modules, each vanishing, exploding or healthy."""
    return [
        reading(
            rng.choice([-0.9, -0.44, -0.02, 0.0, 0.02, 0.12]) * rng.uniform(0.9, 1.1),
            module=f"encoder.{i}" if i % 2 else f"rnn{i}",
            part=rng.choice(["l0", "l1", "l0_reverse"]),
            kind=rng.choice(list(CAUSES)),
            decay_error=rng.choice([0.005, 0.02, math.nan]),
            timesteps=rng.choice([5, 60, 120, 784]),
        )
        for i in range(modules)
    ]


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


READINGS = st.builds(
    TimeReading,
    module=st.sampled_from(["", "rnn", "layers.0", "class"]),
    part=st.sampled_from(["", "l0", "l3_reverse"]),
    source=st.sampled_from(["exact", "input", "output"]),
    kind=st.sampled_from(list(CAUSES)),
    timesteps=st.integers(0, 100_000),
    decay_rate=st.floats() | st.floats(-5, 5),
    decay_error=st.floats(),
    recency=st.floats(),
    causes=st.dictionaries(st.sampled_from(["forget_gate", "spectral_radius"]), st.floats()),
)
ANYTHING = st.lists(
    st.tuples(
        st.integers(0, 100), st.none() | st.floats() | st.just(1.0), st.lists(READINGS, max_size=3)
    ),
    max_size=60,
)


@every_kind
@given(steps=ANYTHING)
def test_any_input_is_survived(
    kind: type[TimeDetector], steps: list[tuple[int, float | None, list[TimeReading]]]
) -> None:
    detector = kind()
    step = 0
    for gap, loss, readings in steps:
        step += gap
        for finding in detector.observe(Observation(step, loss, 1.0, None, tuple(readings))):
            assert all(math.isfinite(v) for v in finding.evidence.values())
            json.dumps(finding.to_dict(), allow_nan=False)
            for remedy in finding.remedies:
                compile(remedy.code, "remedy", "exec")
        assert detector.wants_exact in (True, False)
    written = json.loads(json.dumps(detector.state_dict()))
    other = kind()
    other.load_state_dict(written)
    assert json.dumps(other.state_dict()) == json.dumps(detector.state_dict())


@every_kind
@few
@given(seed=st.integers(0, 10_000), exponent=st.floats(-12, 12))
def test_scaling_the_loss_changes_no_finding(
    kind: type[TimeDetector], seed: int, exponent: float
) -> None:
    c = 10.0**exponent
    steps = eventful(seed)
    scaled = [replace(s, loss=c * s.loss, total_norm=c * s.total_norm) for s in steps if s.loss]
    assert len(scaled) == len(steps)
    assert facts(diagnose(scaled, [kind()])) == facts(diagnose(steps, [kind()]))


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


@every_kind
@few
@given(seed=st.integers(0, 10_000))
def test_the_same_run_gives_the_same_findings(kind: type[TimeDetector], seed: int) -> None:
    assert diagnose(eventful(seed), [kind()]) == diagnose(eventful(seed), [kind()])


@every_kind
@few
@given(seed=st.integers(0, 10_000), cut=st.floats(0, 1))
def test_a_restored_state_continues_identically(
    kind: type[TimeDetector], seed: int, cut: float
) -> None:
    steps = eventful(seed)
    k = int(cut * len(steps))
    whole, first, second = kind(), kind(), kind()
    expected = [(whole.observe(s), whole.wants_exact) for s in steps]
    found = [(first.observe(s), first.wants_exact) for s in steps[:k]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [(second.observe(s), second.wants_exact) for s in steps[k:]]
    assert found == expected
    assert second.state_dict() == whole.state_dict()


@every_kind
def test_a_state_is_a_copy_that_loads_with_weights_only(kind: type[TimeDetector]) -> None:
    detector = kind()
    steps = eventful(3)
    diagnose(steps[:250], [detector])
    state = detector.state_dict()
    written = json.dumps(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state
    other = kind()
    other.load_state_dict(state)
    diagnose(steps[250:], [detector])
    diagnose(steps[250:], [other])
    assert json.dumps(state) == written


@every_kind
def test_reset_forgets_everything(kind: type[TimeDetector]) -> None:
    detector = kind()
    diagnose(eventful(1), [detector])
    detector.reset()
    assert detector.state_dict() == kind().state_dict()
    assert diagnose(eventful(2), [detector]) == diagnose(eventful(2), [kind()])


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
