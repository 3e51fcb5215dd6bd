"""A report reads well, holds everything as data, and needs no rich."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnose import Finding, Pathology, Remedy, Severity
from lightning_gradguard.diagnose.remedies import remedies_for, with_remedies
from lightning_gradguard.readings import ModelFacts, TimeReading
from lightning_gradguard.record import OptimizerReport, Recorder, Report
from lightning_gradguard.record.finding_groups import group_findings
from lightning_gradguard.record.plain_report import wrapped_code
from lightning_gradguard.respond import Action, ActionKind

DEEP = ModelFacts(
    optimizer="SGD",
    lr=0.1,
    kinds={str(n): ("linear", "sigmoid")[n % 2] for n in range(25)},
)


def finding(
    pathology: Pathology = Pathology.EXPLODING,
    step: int = 40,
    severity: Severity = Severity.WARNING,
    where: str = "layer",
    **more: Any,
) -> Finding:
    message = f"Something happens in `{where}` at step {step}."
    plain = Finding(pathology, severity, where, step, {"z": 9.0}, message, **more)
    return with_remedies(plain, DEEP)


def action(step: int, kind: ActionKind = ActionKind.SKIP) -> Action:
    return Action(kind, step, f"{kind.value} at {step}", {"total_norm": float("nan")})


def report(*findings: Finding, label: str = "", **more: Any) -> Report:
    return Report((OptimizerReport(findings, label=label, **more),))


def printed(shown: Report, width: int = 120) -> str:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width).print(shown)
    return file.getvalue()


def test_it_names_place_certainty_steps_numbers_remedies_and_actions() -> None:
    actions = (*(action(s) for s in (5, 6, 7)), action(9, ActionKind.STOP))
    counts = {"steps": 60, "skipped_steps": 3, "findings": 1}
    text = str(report(finding(since=30), label="optimizer0", actions=actions, counts=counts))
    assert text.splitlines()[:2] == [
        "GradGuard report (optimizer0)",
        "1 finding (1 warning) in 60 steps; 3 skipped.",
    ]
    assert "WARNING: exploding in layer, likely, since step 30" in text
    assert "  Something happens in `layer` at step 40.\n  z 9\n" in text
    assert "-> Lower the learning rate to a tenth." in text
    assert "optimizer = torch.optim.SGD(model.parameters(), lr=0.01)" in text
    assert "measured: docs/remedies.md#lower-learning-rate" in text
    assert "steps 5-7: 3 steps skipped" in text
    assert "skip at 6" not in text
    assert "stop at 9" in text


def test_a_remedy_is_said_once() -> None:
    assert str(report(finding())).lower().count("lower the learning rate") == 1


def test_what_is_harmless_stays_short() -> None:
    (line,) = str(report(finding(severity=Severity.INFO))).splitlines()[3:-1] or [""]
    text = str(report(finding(severity=Severity.INFO)))
    assert "info: Something happens" in text
    assert "->" not in text
    assert "torch" not in text
    assert line.startswith("info: ")


def test_consequences_stand_beneath_their_cause() -> None:
    cause = finding(Pathology.VANISHING_IN_DEPTH, 300, where="0")
    slow = finding(
        Pathology.UPDATE_OUT_OF_RANGE, 350, where="2", follows_from="vanishing_in_depth in 0"
    )
    stuck = finding(
        Pathology.STAGNATING, 100, where="loss", follows_from="update_out_of_range in 2", until=500
    )
    other = finding(Pathology.NON_FINITE, 20, where="4", fact=True)
    groups = group_findings([stuck, slow, cause, other])
    assert [(g.cause, g.consequences) for g in groups] == [(other, ()), (cause, (slow, stuck))]
    lines = str(report(stuck, slow, cause, other)).splitlines()
    (place,) = [n for n, line in enumerate(lines) if "vanishing_in_depth in 0, likely" in line]
    below = [line for line in lines[place:] if "brings about" in line]
    assert below == [
        "  brings about: update_out_of_range in 2, warning, since step 350",
        "  brings about: stagnating in loss, warning, steps 100-500, healed",
    ]
    assert any("non_finite in 4, certain" in line for line in lines)


def test_a_finding_whose_cause_is_gone_stands_by_itself() -> None:
    orphan = finding(follows_from="underflow in model")
    assert [g.cause for g in group_findings([orphan])] == [orphan]


def test_two_that_name_each_other_both_appear() -> None:
    one = finding(where="a", follows_from="exploding in b")
    two = finding(where="b", follows_from="exploding in a")
    groups = group_findings([one, two])
    shown = [f for g in groups for f in (g.cause, *g.consequences)]
    assert sorted(f.where for f in shown) == ["a", "b"]


@given(
    st.lists(
        st.builds(
            finding,
            st.sampled_from(Pathology),
            st.integers(0, 50),
            st.sampled_from(Severity),
            st.sampled_from(["a", "b"]),
            follows_from=st.sampled_from(["", *(f"{p.value} in a" for p in Pathology)]),
            until=st.sampled_from([None, 60]),
        ),
        max_size=8,
    )
)
def test_every_finding_appears_exactly_once(findings: list[Finding]) -> None:
    shown = [f for g in group_findings(findings) for f in (g.cause, *g.consequences)]
    assert sorted(map(id, shown)) == sorted(map(id, findings))
    causes = [g.cause for g in group_findings(findings)]
    healed = [f.until is not None for f in causes]
    assert healed == sorted(healed)


@pytest.mark.parametrize("pathology", list(Pathology))
def test_lines_are_no_longer_than_a_hundred_columns(pathology: Pathology) -> None:
    text = str(report(finding(pathology, where="3"), finding(pathology, 7, Severity.INFO, "1")))
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("pathology", list(Pathology))
@pytest.mark.parametrize("width", [40, 93])
def test_wrapped_code_means_the_same(pathology: Pathology, width: int) -> None:
    for remedy in remedies_for(finding(pathology, where="3"), DEEP):
        lines = wrapped_code(remedy.code, width)
        assert ast.dump(ast.parse("\n".join(lines))) == ast.dump(ast.parse(remedy.code))


def test_it_stays_short() -> None:
    findings = [finding(step=step, where=f"layer{step}") for step in range(500)]
    kinds = (ActionKind.TIGHTEN, ActionKind.BACK_OFF)
    actions = tuple(action(step, kinds[step % 2]) for step in range(500))
    text = str(report(*findings, actions=actions))
    assert len(text.splitlines()) < 180
    assert "layer0" in text
    assert "WARNING: exploding in layer19, likely, since step 19" in text
    assert "and 480 more findings" in text
    assert "at 499" in text
    assert "and 480 more findings" in printed(report(*findings))


def test_a_report_of_nothing() -> None:
    assert str(report()) == "GradGuard report\nNo finding in the run; no step was touched."
    assert "Nothing was trained" in str(Report(()))
    assert report().findings == []


def test_several_optimizers() -> None:
    recorder = Recorder("second", silent=True)
    recorder.finding(finding(step=3))
    parts = (OptimizerReport((finding(step=9),), label="first"),)
    both = Report((*parts, OptimizerReport.of(recorder, {"steps": 12})))
    assert [f.step for f in both.findings] == [3, 9]
    for shown in (str(both), printed(both)):
        assert "GradGuard report (first)" in shown
        assert "GradGuard report (second)" in shown
        assert "in 12 steps" in shown


def test_data_holds_everything_as_valid_json() -> None:
    reading = TimeReading("rnn", "l0", "exact", timesteps=50)
    whole = report(finding(), actions=(action(3),), counts={"steps": 9}, time=(reading,), label="o")
    (part,) = json.loads(whole.to_json())["optimizers"]
    assert part == whole.to_dict()["optimizers"][0]
    assert Finding.from_dict(part["findings"][0]) == finding()
    assert part["actions"][0]["numbers"] == {"total_norm": "nan"}
    assert part["counts"] == {"steps": 9}
    assert part["time"][0]["decay_rate"] == "nan"
    assert "\n" not in whole.to_json(indent=None)


def test_the_table_of_rich_shows_the_same() -> None:
    reading = TimeReading("rnn", "l0", "exact", timesteps=50, decay_rate=-0.2)
    bracket = Finding(
        Pathology.SATURATED,
        Severity.WARNING,
        "x[/red]",
        1,
        {},
        "Odd.",
        (Remedy("Try.", "[p for p in model.parameters()]"),),
    )
    stuck = finding(Pathology.STAGNATING, where="loss", follows_from="exploding in layer")
    whole = report(
        bracket,
        finding(since=30),
        stuck,
        finding(severity=Severity.INFO, where="other"),
        actions=(action(3),),
        time=(reading,),
    )
    text = printed(whole)
    for part in ("x[/red]", "[p for p in model.parameters()]", "Lower the learning rate", "z 9"):
        assert part in text
    for part in ("since step 30", "likely", "possible", "brings about: stagnating in loss"):
        assert part in text
    for part in ("skip at 3", "rnn/l0", "#lower-learning-rate"):
        assert part in text
    assert max(map(len, printed(whole, 80).splitlines())) <= 80


def test_print_shows_a_table_with_rich_and_text_without(monkeypatch: Any) -> None:
    whole = report(finding())
    file = io.StringIO()
    whole.print(file)
    assert "│" in file.getvalue()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    file = io.StringIO()
    whole.print(file)
    assert file.getvalue() == f"{whole}\n"


PROGRAM = """
import sys
from lightning_gradguard.record import OptimizerReport, Report
report = Report((OptimizerReport(),))
str(report), report.to_json()
{more}
print("rich" in sys.modules)
"""


@pytest.mark.parametrize(("more", "imported"), [("", "False"), ("report.__rich__()", "True")])
def test_rich_is_imported_only_to_print(more: str, imported: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(more=more)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == imported
