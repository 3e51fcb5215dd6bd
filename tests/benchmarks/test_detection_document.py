"""The page about detection says what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.detection.document import DOCUMENT, page
from benchmarks.detection.programs import ALL
from benchmarks.detection.results import RESULTS
from benchmarks.detection.split import side
from lightning_gradguard.diagnose import Pathology


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads((RESULTS / "detection_cpu.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_measurements_give(result: dict) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page(result), "run the benchmark again"


def test_the_measurements_are_of_all_programs_as_they_are(result: dict) -> None:
    assert {run["program"] for run in result["runs"]} == {program.name for program in ALL}
    for name, values in result["sides"].items():
        programs = [program for program in ALL if side(program) == name]
        assert values["runs"]["programs"] == len(programs)
        assert {c for p in programs for c in p.causes[:1]} == {p.value for p in Pathology}
    assert not result["crashes"]
