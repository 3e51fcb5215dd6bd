"""What holds for every detector."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose import (
    Detector,
    DivergingDetector,
    ExplodingDetector,
    Finding,
    LossSpikeDetector,
    NonFiniteDetector,
    Observation,
    OscillatingDetector,
    Pathology,
    Severity,
    StagnatingDetector,
    Thresholds,
    default_detectors,
)
from lightning_gradguard.diagnose.remedies import with_remedies
from lightning_gradguard.readings import ModelFacts
from tests.diagnose.mixed_runs import eventful_trace as eventful
from tests.diagnose.traces import (
    Trace,
    diagnose,
    explosion,
    falling,
    heavy_tailed,
)

KINDS = [
    NonFiniteDetector,
    ExplodingDetector,
    LossSpikeDetector,
    DivergingDetector,
    OscillatingDetector,
    StagnatingDetector,
]
# Each example is a whole run.
few = settings(max_examples=20)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def facts(findings: list[Finding]) -> list[tuple[str, str, str, int]]:
    return [(f.pathology.value, f.severity.label, f.where, f.step) for f in findings]


def observations(trace: Trace, start: int = 0) -> Iterator[Observation]:
    for step, (loss, norm) in enumerate(trace, start):
        yield Observation(step, loss, norm, new_phase=step % 300 == 299)


def test_the_default_detectors_are_one_per_pathology() -> None:
    assert [type(d) for d in default_detectors()] == KINDS
    first, second = default_detectors(), default_detectors()
    assert all(a is not b for a, b in zip(first, second, strict=True))


def test_thresholds_reach_every_detector() -> None:
    short = Thresholds(heal_steps=1, slow_heal_steps=1)
    assert all(d._episode.heal_steps == 1 for d in default_detectors(short))  # type: ignore[attr-defined]


def test_eventful_runs_make_every_detector_speak() -> None:
    """Or the properties below would hold because nothing happens."""
    found = [f for seed in range(20) for f in diagnose(eventful(seed))]
    # All others need readings of layers or of time; their detectors have tests of their own.
    assert {f.pathology for f in found} == {
        Pathology.NON_FINITE,
        Pathology.EXPLODING,
        Pathology.LOSS_SPIKE,
        Pathology.DIVERGING,
        Pathology.OSCILLATING,
        Pathology.STAGNATING,
    }
    assert {f.severity for f in found} == set(Severity)


def test_diagnosis_needs_no_torch() -> None:
    code = "import sys, lightning_gradguard.diagnose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    torch_too = code.replace("diagnose", "measure")
    assert subprocess.run([sys.executable, "-c", torch_too], check=False).returncode == 1


@every_kind
@few
@given(seed=st.integers(0, 10_000), exponent=st.floats(-12, 12))
def test_the_unit_of_the_gradient_alone_changes_no_finding(
    kind: type[Detector], seed: int, exponent: float
) -> None:
    trace = eventful(seed)
    scaled = [(loss, 10.0**exponent * norm) for loss, norm in trace]
    assert facts(diagnose(scaled, [kind()])) == facts(diagnose(trace, [kind()]))


@every_kind
@few
@given(seed=st.integers(0, 10_000), shift=st.floats(100.0, 1000.0))
def test_below_zero_shifting_the_loss_changes_no_finding(
    kind: type[Detector], seed: int, shift: float
) -> None:
    """Where no loss is positive, only differences count."""
    trace = [(-1000.0 + min(loss, 100.0), norm) for loss, norm in eventful(seed)]
    shifted = [(loss - shift, norm) for loss, norm in trace]
    assert facts(diagnose(shifted, [kind()])) == facts(diagnose(trace, [kind()]))


def test_memory_is_bounded_over_many_steps() -> None:
    rng = random.Random(0)
    detectors = default_detectors()
    trace = heavy_tailed(rng, 40_000) + explosion(rng, 1000, 0.1) + falling(rng, 58_600)
    sizes = []
    for observation in observations(trace):
        for detector in detectors:
            detector.observe(observation)
        if observation.step % 5000 == 4999:
            sizes.append(sum(len(json.dumps(d.state_dict())) for d in detectors))
    assert len(trace) == 100_000
    # 2 windows of 128, 5 x (2 blocks of 16, 32 moves and 64 points), a window of 32 and a block of
    # norms at up to 25 characters a number.
    assert max(sizes) < 25 * (2 * (128 + 16) + 5 * (2 * 16 + 32 + 64 + 16) + 32 + 16 + 60)


@pytest.fixture(scope="module")
def found() -> list[Finding]:
    findings = [f for seed in range(60) for f in diagnose(eventful(seed), planned=700)]
    named = {"encoder.rnn.weight_hh_l0": 9.0, "head.bias": math.nan, "bias": math.nan}
    for loss, total in ((1.0, math.nan), (math.nan, math.inf)):
        findings += NonFiniteDetector().observe(Observation(4, loss, total, named))
    exploding = ExplodingDetector()
    for step in range(60):
        observation = Observation(step, 2.0 * 1.3**step, 2.0**step, {"encoder.rnn.weight": 1.0})
        findings += exploding.observe(observation)
    return findings


def test_messages_read_well(found: list[Finding]) -> None:
    assert {(f.pathology, f.severity) for f in found} >= {
        (Pathology.NON_FINITE, Severity.CRITICAL),
        (Pathology.EXPLODING, Severity.INFO),
        (Pathology.EXPLODING, Severity.WARNING),
        (Pathology.LOSS_SPIKE, Severity.INFO),
        (Pathology.LOSS_SPIKE, Severity.WARNING),
        (Pathology.DIVERGING, Severity.INFO),
        (Pathology.DIVERGING, Severity.WARNING),
        (Pathology.DIVERGING, Severity.CRITICAL),
        (Pathology.OSCILLATING, Severity.INFO),
        (Pathology.OSCILLATING, Severity.WARNING),
        (Pathology.STAGNATING, Severity.INFO),
        (Pathology.STAGNATING, Severity.WARNING),
    }
    for finding in found:
        message = finding.message
        assert re.fullmatch(r"The .+\.", message), message
        assert not re.search(r"[.!?]\s", message), f"more than one sentence: {message}"
        assert re.search(r"\d", message), f"no number: {message}"
        assert message.isascii()
        assert len(message) < 200, message
        assert "  " not in message
        place = {"model": "the model", "loss": "The loss"}.get(finding.where, f"`{finding.where}`")
        assert place in message, message
        # What follows: every message goes on after a comma.
        assert re.search(r", (so|and|which) ", message), message


def test_a_symptom_begins_before_it_is_found(found: list[Finding]) -> None:
    """Where the detector says nothing, it is the step of the finding."""
    since = [(f.since, f.step) for f in found if f.pathology is not Pathology.NON_FINITE]
    assert all(begun is not None and 0 <= begun <= step for begun, step in since)
    assert any(begun is not None and begun < step - 100 for begun, step in since)


def test_remedies_are_sentences_with_code(found: list[Finding]) -> None:
    for finding in found:
        assert finding.remedies == (), "they are chosen for the model, by the diagnosis"
        remedies = with_remedies(finding, ModelFacts()).remedies
        assert 1 <= len(remedies) <= 3
        for remedy in remedies:
            assert re.fullmatch(r"[A-Z][^.]*\.", remedy.sentence), remedy.sentence
            compile(remedy.code, "remedy", "exec")
