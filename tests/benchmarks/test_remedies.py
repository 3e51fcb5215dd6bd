"""What is said about remedies was measured, with the lines that the library gives now."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.remedies.cases import CASES, Case
from benchmarks.remedies.document import DOCUMENT, document
from benchmarks.remedies.results import RESULTS
from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.diagnose.remedies import remedies_for
from lightning_gradguard.diagnose.time_remedies import explosion_remedies, vanishing_remedies
from lightning_gradguard.readings import ModelFacts, TimeReading


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads((RESULTS / "remedies_cpu.json").read_text(encoding="utf-8"))


def test_the_document_shows_the_measured_numbers(result: dict[str, Any]) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(result)


def test_every_case_was_measured(result: dict[str, Any]) -> None:
    assert list(result["cases"]) == [case.heading for case in CASES]
    assert result["settings"]["seeds"] == 5
    for case in result["cases"].values():
        assert len(case["with"]) == len(case["without"]) == 5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.anchor)
def test_the_measured_line_is_the_one_that_is_given(case: Case, result: dict[str, Any]) -> None:
    remedy = case.remedy(case.build())
    measured = result["cases"][case.heading]
    assert (measured["sentence"], measured["code"]) == (remedy.sentence, remedy.code)
    assert remedy.evidence == f"docs/remedies.md#{case.anchor}"


def test_a_remedy_that_is_linked_to_helped(result: dict[str, Any]) -> None:
    for heading, case in result["cases"].items():
        better = sorted(case["with"])[2] - sorted(case["without"])[2]
        assert better > 5.0, heading


def test_every_link_of_a_remedy_leads_to_a_heading() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    anchors = {f"docs/remedies.md#{heading.lower().replace(' ', '-')}" for heading in headings}
    kinds = {"a": "linear", "b": "relu", "c": "linear", "d": "tanh", "rnn": "rnn", "e": "linear"}
    links = set()
    for pathology, facts, where in itertools.product(
        Pathology,
        (ModelFacts("SGD", 0.1, kinds=kinds), ModelFacts("SGD", 0.1), ModelFacts()),
        ("b", "d", "rnn", "model"),
    ):
        for evidence in ({}, {"no_optimizer": 1.0}, {"median": 0.1}, {"latest": 3.0}):
            finding = Finding(pathology, Severity.WARNING, where, 0, evidence, "It is.")
            links |= {remedy.evidence for remedy in remedies_for(finding, facts)}
    for kind in ("lstm", "gru", "tanh", "relu", "prelu", "other"):
        reading = TimeReading("rnn", "l0", "exact", kind, 60, decay_rate=-0.5)
        for remedy in (*vanishing_remedies(reading), *explosion_remedies(reading)):
            links.add(remedy.evidence)
    assert links - {""} <= anchors
    assert len(links) > 12


def test_recurrent_remedies_are_ranked_as_they_were_measured(result: dict[str, Any]) -> None:
    """None is named before one whose range lies above its own; simpler ones go first else."""

    def scores(evidence: str) -> list[float]:
        anchor = evidence.partition("#")[2]
        (case,) = [c for c in CASES if c.anchor == anchor]
        return result["cases"][case.heading]["with"]

    for kind in ("tanh", "relu"):
        reading = TimeReading("rnn", "l0", "exact", kind, 60, decay_rate=-0.5)
        measured = [scores(r.evidence) for r in vanishing_remedies(reading) if r.evidence]
        assert len(measured) == 3
        for first, second in itertools.combinations(measured, 2):
            assert min(second) <= max(first), kind


def test_quick_run_leaves_table_json_and_plot(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    before = DOCUMENT.read_bytes()
    arguments = ["--quick", "--cases", "leaky-relu", "fresh-layer", "--output", str(tmp_path)]
    assert main(["remedies", *arguments]) == 0
    result = json.loads((tmp_path / "remedies_cpu_quick.json").read_text())
    assert result["settings"]["seeds"] == 1
    for case in result["cases"].values():
        assert case["without"][0] < 20.0
        assert case["with"][0] > 80.0
    assert (tmp_path / "remedies_cpu_quick.png").read_bytes().startswith(b"\x89PNG")
    assert "ReLU layer with biases of -6" in capsys.readouterr().out
    assert DOCUMENT.read_bytes() == before


def test_cuda_without_a_device_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda"):
        main(["remedies", "--device", "cuda"])
