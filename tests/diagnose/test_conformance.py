"""What holds for every detector there is, on runs that have everything at once."""

from __future__ import annotations

import io
import json
import math
import random
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose import (
    Detector,
    Finding,
    NotTrainingDetector,
    Observation,
    Pathology,
    Severity,
    TimeDetector,
    TimeExplosionDetector,
    UnderflowDetector,
    UpdateRangeDetector,
    VanishingInDepthDetector,
    VanishingInTimeDetector,
    default_detectors,
    layer_detectors,
    time_detectors,
)
from tests.diagnose.layer_runs import looking, relu, tanh
from tests.diagnose.mixed_runs import KINDS, Run, anything, diagnose, mixed, renamed, scaled
from tests.diagnose.time_runs import reading

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
# Each example is a whole run.
few = settings(max_examples=20)
SEEDS = st.integers(0, 10_000)


def facts(findings: list[Finding]) -> list[tuple[str, str, str, int]]:
    return [(f.pathology.value, f.severity.label, f.where, f.step) for f in findings]


def wishes(detector: Detector) -> bool | None:
    return detector.wants_exact if hasattr(detector, "wants_exact") else None


def test_mixed_runs_make_every_detector_speak() -> None:
    """Or the properties below would hold because nothing happens."""
    spoken: dict[str, Counter[Severity]] = {}
    for kind in KINDS:
        found = [f for seed in range(40) for f in diagnose(mixed(seed), kind())]
        spoken[kind.__name__] = Counter(f.severity for f in found)  # type: ignore[attr-defined]
    for name, severities in spoken.items():
        assert severities[Severity.WARNING] or name == "NonFiniteDetector", spoken
        assert severities[Severity.INFO] or name == "NonFiniteDetector", spoken
    assert spoken["NonFiniteDetector"][Severity.CRITICAL]
    assert spoken["DivergingDetector"][Severity.CRITICAL]


# ---- what it returns ----------------------------------------------------------------------------


@every_kind
@few
@given(seed=SEEDS)
def test_the_same_run_gives_the_same_findings(kind: type[Detector], seed: int) -> None:
    assert diagnose(mixed(seed), kind()) == diagnose(mixed(seed), kind())


@every_kind
@settings(max_examples=60)
@given(steps=anything())
def test_any_input_is_survived(kind: type[Detector], steps: Run) -> None:
    detector = kind()
    for step in steps:
        for finding in detector.observe(step):
            assert all(math.isfinite(v) for v in finding.evidence.values())
            assert finding.step == step.step
            assert finding.since is None or finding.since <= finding.step
            assert detector.is_open(finding.where)
            json.dumps(finding.to_dict(), allow_nan=False)
            assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding
        assert wishes(detector) in (None, True, False)
    written = json.dumps(detector.state_dict(), allow_nan=False)
    other = kind()
    other.load_state_dict(json.loads(written))
    assert json.dumps(other.state_dict()) == written


NOTHING: dict[str, Run] = {
    "empty": [],
    "one step": [Observation(0, 1.0, 1.0)],
    "one unknown": [Observation(0, None, 0.0)],
    "zero": [Observation(step, 0.0, 0.0) for step in range(500)],
    "constant": [Observation(step, -3.0, 2.0) for step in range(190)],
    "no loss": [Observation(step, None, 1.0) for step in range(500)],
    "one look": [Observation(0, 1.0, 1.0, inspection=looking(None, relu(1.0), tanh(1.0))(0))],
    "one reading": [Observation(0, 1.0, 1.0, time=(reading(-0.44),))],
}


@every_kind
@pytest.mark.parametrize("name", NOTHING)
def test_inputs_without_news_give_no_finding(kind: type[Detector], name: str) -> None:
    detector = kind()
    assert diagnose(NOTHING[name], detector) == []
    assert not any(detector.is_open(where) for where in ("model", "loss", "rnn", "net.0", ""))


# Reasons or layers of one module; updates of the whole model that are too small, or too large.
SEVERAL_AT_ONE_PLACE = (
    NotTrainingDetector,
    TimeExplosionDetector,
    VanishingInTimeDetector,
    UpdateRangeDetector,
)


@every_kind
@few
@given(seed=SEEDS)
def test_a_finding_is_open_until_it_heals_and_said_again_only_if_worse(
    kind: type[Detector], seed: int
) -> None:
    detector = kind()
    # The detectors of one place have one episode, wherever it is said to be.
    by_place = kind in {type(d) for d in (*layer_detectors(), *time_detectors())}
    known: dict[str, Severity | None] = {}
    for step in mixed(seed):
        for finding in detector.observe(step):
            assert finding.since is None or 0 <= finding.since <= finding.step
            place = finding.where if by_place else ""
            before = known.get(place)
            if kind not in SEVERAL_AT_ONE_PLACE:
                assert before is None or finding.severity > before, (finding, before)
            known[place] = finding.severity
            assert detector.is_open(finding.where)
        for place, severity in known.items():
            if severity is None:
                assert not detector.is_open(place), "open again without a finding"
            elif not detector.is_open(place):
                known[place] = None
        assert known or not detector.is_open("net.0")
        assert not by_place or not detector.is_open("nowhere")


# ---- units and names ----------------------------------------------------------------------------


@every_kind
@few
@given(seed=SEEDS, exponent=st.floats(-12, 12))
def test_scaling_the_loss_changes_no_finding(
    kind: type[Detector], seed: int, exponent: float
) -> None:
    """Of underflow only the norms do not matter: what is lost is lost by the dtype."""
    steps = mixed(seed)
    other = scaled(steps, 10.0**exponent, layers=kind is not UnderflowDetector)
    assert facts(diagnose(other, kind())) == facts(diagnose(steps, kind()))


@every_kind
@few
@given(seed=SEEDS, order=st.permutations(range(6)))
def test_other_names_of_the_modules_give_the_findings_other_names(
    kind: type[Detector], seed: int, order: list[int]
) -> None:
    def name(text: str) -> str:
        text = re.sub(r"\bnet\.(\d)", lambda m: f"net.{order[int(m[1])]}", text)
        text = re.sub(r"\b(rnn|encoder\.)(\d)\b", lambda m: f"{m[1]}{5 - int(m[2])}", text)
        return re.sub(r"\b(act|gate)\.(\d)", lambda m: f"{m[1]}.{1 - int(m[2])}", text)

    def plain(findings: list[Finding]) -> list[Finding]:
        return [replace(f, remedies=()) for f in findings]  # have tests of their own

    steps = mixed(seed)
    found = plain(diagnose(steps, kind()))
    expected = [replace(f, where=name(f.where), message=name(f.message)) for f in found]
    assert plain(diagnose(renamed(steps, name), kind())) == expected


@every_kind
@few
@given(seed=SEEDS)
def test_the_order_in_which_modules_are_told_changes_no_verdict(
    kind: type[Detector], seed: int
) -> None:
    """Where several are told together, the first is named; how bad it is stays the same."""
    if kind in (VanishingInDepthDetector, NotTrainingDetector):
        return  # they judge what comes before and after

    def told(findings: list[Finding]) -> list[tuple[int, Severity, Pathology]]:
        return sorted((f.step, f.severity, f.pathology) for f in findings)

    steps = [replace(s, norms=None) for s in mixed(seed)]
    turned = []
    for step in steps:
        look = step.inspection
        # Without shares of rows: which of two layers in a row is to blame follows from the order.
        parameters = [replace(r, dead_rows=math.nan) for r in look.parameters] if look else []
        turned.append(
            replace(
                step,
                time=step.time[::-1],
                inspection=look
                and replace(
                    look,
                    parameters=tuple(parameters[::-1]),
                    activations=look.activations[::-1],
                ),
            )
        )
        if look:
            steps[len(turned) - 1] = replace(
                step, inspection=replace(look, parameters=tuple(parameters))
            )
    assert told(diagnose(turned, kind())) == told(diagnose(steps, kind()))


# ---- state --------------------------------------------------------------------------------------


@every_kind
@few
@given(seed=SEEDS, cut=st.floats(0, 1))
def test_a_restored_state_continues_identically(
    kind: type[Detector], seed: int, cut: float
) -> None:
    steps = mixed(seed)
    k = int(cut * len(steps))
    whole, first, second = kind(), kind(), kind()
    expected = [(whole.observe(s), wishes(whole)) for s in steps]
    found = [(first.observe(s), wishes(first)) for s in steps[:k]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [(second.observe(s), wishes(second)) for s in steps[k:]]
    assert found == expected
    assert second.state_dict() == whole.state_dict()
    places = ["model", "loss", *(f"net.{i}" for i in range(6)), "act.0", "gate.1", "rnn0"]
    assert [second.is_open(p) for p in places] == [whole.is_open(p) for p in places]


@every_kind
def test_a_state_is_a_copy_that_loads_with_weights_only(kind: type[Detector]) -> None:
    for seed in range(12):
        detector, other = kind(), kind()
        steps = mixed(seed)
        half = len(steps) // 2
        diagnose(steps[:half], detector)
        state = detector.state_dict()
        written = json.dumps(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=True) == state
        other.load_state_dict(state)
        diagnose(steps[half:], detector)
        diagnose(steps[half:], other)
        assert json.dumps(state) == written


@every_kind
def test_reset_forgets_everything(kind: type[Detector]) -> None:
    detector = kind()
    fresh = json.dumps(detector.state_dict())
    for seed in range(6):
        diagnose(mixed(seed), detector)
    assert json.dumps(detector.state_dict()) != fresh or kind.__name__ == "NonFiniteDetector"
    detector.reset()
    assert json.dumps(detector.state_dict()) == fresh
    assert diagnose(mixed(9), detector) == diagnose(mixed(9), kind())


# ---- long runs ----------------------------------------------------------------------------------

MILLION = 1_000_000
CYCLE = 10_000


def long_cycle() -> Run:
    """A loss in waves, with spikes and swings; looks and readings that come and go."""
    rng = random.Random(0)
    stations = [step for seed in range(40) for step in mixed(seed)]
    looks = [s.inspection for s in stations if s.inspection is not None]
    times = [s.time for s in stations if s.time]
    steps = []
    for step in range(CYCLE):
        look, at = None, step // 1000
        if step % 50 == 0:
            look = replace(looks[(37 * at) % len(looks)], step=step)
        level = 2.3 + math.sin(2 * math.pi * step / CYCLE) + (5.0 if step % 2500 < 100 else 0.0)
        level += 2.0 * (1.0 + math.sin(step / 5.0)) if 6000 <= step < 7000 else 0.0
        steps.append(
            Observation(
                step,
                math.nan if step == 7777 else level + rng.gauss(0, 0.1),
                math.exp(rng.gauss(0, 0.3)) * (1e3 if step % 3000 == 2999 else 1.0),
                time=times[(37 * at) % len(times)] if step % 100 == 0 else (),
                inspection=look,
                new_phase=step % 5000 == 4999,
            )
        )
    return steps


@pytest.mark.slow
def test_a_million_steps() -> None:
    cycle = long_cycle()
    detectors: list[Detector | TimeDetector] = [
        *default_detectors(),
        *layer_detectors(),
        *time_detectors(),
    ]
    spent = dict.fromkeys((type(d).__name__ for d in detectors), 0.0)
    counts: Counter[str] = Counter()
    sizes: list[int] = []
    for begin in range(0, MILLION, CYCLE):
        steps = [
            Observation(
                begin + o.step,
                o.loss,
                o.total_norm,
                time=o.time,
                inspection=o.inspection and replace(o.inspection, step=begin + o.step),
                new_phase=o.new_phase,
            )
            for o in cycle
        ]
        for detector in detectors:
            start = time.perf_counter()
            found = diagnose(steps, detector)
            spent[type(detector).__name__] += time.perf_counter() - start
            counts[type(detector).__name__] += len(found)
            assert all(math.isfinite(v) for f in found for v in f.evidence.values())
            assert all(f.since is None or f.since <= f.step for f in found)
        sizes.append(sum(len(json.dumps(d.state_dict(), allow_nan=False)) for d in detectors))
    print({name: round(seconds, 1) for name, seconds in spent.items()}, sum(spent.values()))
    print(dict(counts), sizes[0], sizes[9], sizes[-1])
    # Nothing grows but the digits of the steps.
    assert max(sizes[10:]) < 1.1 * max(sizes[1:10])
    # The same trouble comes back in each cycle, and is told in each again, not at each step.
    assert all(counts.values()), counts
    assert max(counts.values()) < 60 * (MILLION // CYCLE)
