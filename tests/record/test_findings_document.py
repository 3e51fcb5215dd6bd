"""The page on findings knows every one of them, and shows reports as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_gradguard.diagnose import Finding, Pathology, Severity

PAGE = (Path(__file__).parents[2] / "docs" / "findings.md").read_text(encoding="utf-8")


def test_every_pathology_is_explained_in_the_order_of_causes() -> None:
    assert re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE) == [p.value for p in Pathology]


@pytest.mark.parametrize("severity", list(Severity))
@pytest.mark.parametrize("fact", [True, False])
def test_every_certainty_is_explained(severity: Severity, fact: bool) -> None:
    finding = Finding(Pathology.EXPLODING, severity, "a", 0, {}, "It is.", fact=fact)
    assert f"| `{finding.certainty}` |" in PAGE


def test_the_program_prints_the_report_that_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = re.findall(r"^```(?:python|text)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[:2]
    exec(compile(code, "docs/findings.md", "exec"), {"__name__": "__main__"})
    without_numbers = re.compile(r"[-+]?\d[\d.e-]*")
    printed = without_numbers.sub("#", capsys.readouterr().out)
    first = [line for line in without_numbers.sub("#", shown).splitlines() if "->" in line]
    assert first
    for line in first:
        assert line in printed
    assert "vanishing_in_depth in" in printed
