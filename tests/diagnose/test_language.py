"""The words of whatever a diagnosis says: plain, complete, and with something to do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from lightning_gradguard.diagnose import (
    Diagnosis,
    Finding,
    Observation,
    Pathology,
    Severity,
    default_detectors,
    layer_detectors,
    time_detectors,
)
from lightning_gradguard.readings import ModelFacts, NonFiniteOrigin
from tests.diagnose.mixed_runs import MODELS, Run, mixed

SEEDS = 40
INFO, WARNING, CRITICAL = Severity.INFO, Severity.WARNING, Severity.CRITICAL


def diagnosed(steps: Run) -> Iterator[Finding]:
    diagnosis = Diagnosis(default_detectors(), [*layer_detectors(), *time_detectors()])
    for step in steps:
        yield from diagnosis.observe(step)


def non_finite(model: ModelFacts) -> Iterator[Finding]:
    """Each place where NaN can begin, and each way in which the rest may be known."""
    origins = [None] + [
        NonFiniteOrigin(place, module, timestep, sample)  # type: ignore[arg-type]
        for place in ("batch", "weights", "forward", "loss", "backward")
        for module in ("", "inputs", "net.0")
        for timestep in (None, 7)
        for sample in (None, 0)
    ]
    norms = {"net.0.weight": 1.0, "net.0.bias": math.nan, "head.weight": math.inf}
    for origin in origins:
        for loss, total in ((1.0, math.nan), (math.nan, 1.0), (math.inf, math.inf), (None, -1.0)):
            for known in (None, norms):
                if total >= 0.0 or not math.isfinite(total):
                    step = Observation(4, loss, total, known, origin=origin, model=model)
                    yield from diagnosed([step])


@cache
def everything() -> tuple[Finding, ...]:
    """Findings of mixed runs, each told for several models; and all kinds of NaN."""
    found: list[Finding] = []
    for seed in range(SEEDS):
        steps = mixed(seed)
        for offset in (0, 1):
            model = MODELS[(seed + offset) % len(MODELS)]
            model = replace(model, planned_steps=steps[0].model.planned_steps)
            found += diagnosed([replace(step, model=model) for step in steps])
    for model in MODELS:
        found += non_finite(model)
    return tuple(found)


def of_kind(pathology: Pathology) -> list[Finding]:
    found = [f for f in everything() if f.pathology is pathology]
    assert found, pathology
    return found


every_pathology = pytest.mark.parametrize("pathology", Pathology, ids=lambda p: p.value)


def test_every_pathology_is_told_in_every_severity() -> None:
    """Or the sentences below would be those that are easy to find."""
    told = {(f.pathology, f.severity) for f in everything()}
    both = set(Pathology) - {Pathology.NON_FINITE}
    expected = {(p, s) for p in both for s in (INFO, WARNING)}
    assert told == expected | {(Pathology.NON_FINITE, CRITICAL), (Pathology.DIVERGING, CRITICAL)}
    assert any(f.until is not None for f in everything())
    assert any(f.follows_from for f in everything())


@every_pathology
def test_a_message_is_one_plain_sentence(pathology: Pathology) -> None:
    for finding in of_kind(pathology):
        message = finding.message
        assert message.isascii(), message
        assert "  " not in message, message
        assert "\n" not in message, message
        assert message == message.strip(), message
        assert len(message) < 450, (len(message), message)
        assert message[0].isupper() or message[0] in "`0123456789", message
        assert message.endswith("."), message
        assert not re.search(r"[.!?]\s", message), f"more than one sentence: {message}"
        assert not re.search(r"\b(nan|inf|None|True|False)\b", _bare(message)), message


@every_pathology
def test_a_message_names_place_number_and_remedy(pathology: Pathology) -> None:
    words = {"model": ("the model", "The model"), "loss": ("the loss", "The loss")}
    for finding in of_kind(pathology):
        message = finding.message
        places = words.get(finding.where, (f"`{finding.where}`",))
        if finding.where == "batch":
            places = ("the batch", "The batch")
        assert any(place in message for place in places), (finding.where, message)
        # A number of its own, not only one in a module's name.
        assert re.search(r"\d", _bare(message)), message
        assert finding.remedies, message
        first = finding.remedies[0].sentence
        assert _words(first)[0] in _words(message), (first, message)


def _bare(message: str) -> str:
    """Without the names of modules and what stands in code."""
    return re.sub(r"`[^`]*`|\w+=\w+", "", message)


def _words(sentence: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+", sentence.lower())


@every_pathology
def test_remedies_are_sentences_with_code_that_compiles(pathology: Pathology) -> None:
    seen = {remedy for f in of_kind(pathology) for remedy in f.remedies}
    assert all(1 <= len(f.remedies) <= 3 for f in of_kind(pathology))
    assert all(len(set(f.remedies)) == len(f.remedies) for f in of_kind(pathology))
    for remedy in seen:
        sentence = remedy.sentence
        assert re.fullmatch(r"[A-Z].*\.", sentence), sentence
        assert not re.search(r"[.!?]\s", sentence), sentence
        assert sentence.isascii(), sentence
        assert "  " not in sentence, sentence
        assert remedy.code.strip(), sentence
        compile(remedy.code, "remedy", "exec")


@every_pathology
def test_what_else_a_finding_says(pathology: Pathology) -> None:
    for finding in of_kind(pathology):
        assert finding.evidence, finding.message
        assert all(math.isfinite(value) for value in finding.evidence.values())
        assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in finding.evidence), finding.evidence
        assert finding.since is not None
        assert 0 <= finding.since <= finding.step
        assert finding.until is None or finding.until > finding.since
        if finding.fact:
            assert finding.pathology in (Pathology.NON_FINITE, Pathology.LAYER_NOT_TRAINING)
        certainty = "certain" if finding.fact else "likely"
        if not finding.fact and finding.severity < WARNING:
            certainty = "possible"
        assert finding.certainty == certainty
        if finding.follows_from:
            cause, _, where = finding.follows_from.partition(" in ")
            assert Pathology(cause)
            assert where
