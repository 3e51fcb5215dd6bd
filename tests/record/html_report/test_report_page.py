"""The page says what happened, in valid HTML, small, the same each time, with names escaped."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.record.html_report import report_html, write_report
from lightning_gradguard.record.html_report import writer as writer_module
from lightning_gradguard.record.html_report.plotly_js import plotly_script
from lightning_gradguard.record.run_history import RunHistory
from tests.record.html_report import pages
from tests.record.html_report.pages import KINDS, Page, figures_of, numbers_of
from tests.record.runs import made_up_run

pytestmark = pytest.mark.skipif(plotly_script() is None, reason="plotly is not installed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compared", [False, True])
def test_every_kind_of_run_gives_a_well_formed_page(kind: str, compared: bool) -> None:
    run = KINDS[kind]()
    html = report_html(run, made_up_run(50, seed=4) if compared else None)

    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(
        after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False)
    )
    assert set(figures_of(html)) == {
        attrs["id"] for tag, attrs in page.elements if attrs.get("class") == "plot"
    }
    for _, attrs in page.elements:
        for name in ("href", "aria-labelledby"):
            target = attrs.get(name)
            assert target is None or target.removeprefix("#") in page.ids


def verdict_of(run: RunHistory) -> str:
    found = re.search(r'<p class="verdict (\w+)">(.*?)</p>', report_html(run))
    assert found is not None
    return f"{found[1]}: {found[2]}"


USUAL = (
    "2 findings in {steps} steps, 1 of them critical, 1 healed; "
    "the guard dropped 1 step, capped 5 and cut the learning rate once."
)
ERROR = "The run failed with ValueError: no such file."


@pytest.mark.parametrize(
    ("make", "verdict"),
    [
        (pages.healthy, "good: Nothing was found in 600 steps; no step was touched."),
        (lambda: made_up_run(400), f"critical: {USUAL.format(steps=400)}"),
        (pages.failed, f"critical: {ERROR} {USUAL.format(steps=50)}"),
        (pages.empty, "good: Still running, at step 0. No step was taken."),
    ],
)
def test_the_verdict_comes_first_and_says_what_came_of_the_run(
    make: Callable[[], RunHistory], verdict: str
) -> None:
    assert verdict_of(make()) == verdict


def test_a_finding_has_its_evidence_remedies_and_consequences() -> None:
    run = made_up_run(400)
    cause = run.findings[0]
    effect = Finding(
        Pathology.STAGNATING,
        Severity.WARNING,
        "loss",
        300,
        {"z": 1.0},
        "The loss stands still.",
        follows_from="vanishing_in_time in encoder.rnn",
    )
    text = Page(report_html(pages.with_part(run, findings=(cause, effect)))).text

    assert "it halves every 1.6 steps, the sequence has 200. What to do" in text
    assert "Use an LSTM. self.rnn = nn.LSTM(64, 128)" in text
    assert "Measured: “tanh RNN to LSTM” in docs/remedies.md." in text
    assert "half life 1.6 timesteps 200" in text
    assert "found at step 120 · since step 90" in text
    assert text.index("It brings about") < text.index("stagnating in loss , since step 300")
    assert text.count("stagnating in loss") == 1


def test_many_findings_are_told_in_brief_after_the_first_ones() -> None:
    one = made_up_run(20).findings[0]
    many = tuple(replace(one, where=f"layer{number}") for number in range(250))
    page = Page(report_html(pages.with_part(made_up_run(20), findings=many)))

    cards = [attrs for tag, attrs in page.elements if tag == "article"]
    assert len(cards) == writer_module.MAX_IN_FULL
    assert "230 more findings" in page.text
    assert "50 more findings in the event log" in page.text


def test_the_page_loads_nothing_and_runs_only_scripts_that_it_knows() -> None:
    html = report_html(made_up_run(50))
    page = Page(html)
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)

    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert not re.search(r"script-src[^;]*unsafe-inline", policy)
    for tag, attrs in page.elements:
        assert "src" not in attrs, tag
        assert not any(name.startswith("on") for name in attrs), tag
        assert (attrs.get("href") or "#").startswith("#")
    without_plotly = re.sub(r'id="plotly">.*?</script>', "", html)
    assert "http://" not in without_plotly
    assert "https://" not in without_plotly


def test_names_of_a_run_stay_text_wherever_they_stand() -> None:
    html = report_html(pages.evil(), pages.evil())
    page = Page(html)

    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert [a.get("id") for a in scripts] == ["figures", "plotly", None]
    assert "<script>alert" not in html
    assert "\u2028" not in re.findall(r'id="figures">(.*?)</script>', html)[0]
    assert page.text.count("<script>alert(1)</script>&") > 20
    figures = figures_of(html)
    rows = figures["optimizer-0-layer-norms"]["data"][0]["rows"]
    assert rows[0].startswith("&lt;script&gt;alert(1)&lt;/script&gt;&amp;")
    assert "<script" not in str(figures)


def test_another_process_makes_the_same_page_and_imports_no_plotly() -> None:
    command = (
        "import hashlib, sys; from tests.record.runs import made_up_run\n"
        "from lightning_gradguard.record.html_report import report_html\n"
        "run = made_up_run(120)\n"
        "print(hashlib.sha256(report_html(run, run).encode()).hexdigest())\n"
        "print([name for name in ('plotly', 'lightning', 'wandb') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True, env=environment
    )
    run = made_up_run(120)
    digest = hashlib.sha256(report_html(run, run).encode()).hexdigest()
    assert done.stdout.splitlines() == [digest, "[]"]


def test_a_run_of_a_thousand_layers_and_a_hundred_thousand_steps_stays_small() -> None:
    run = made_up_run(100_000, 1_000)
    report_html(made_up_run(10))  # plotly.js is packed once for all reports
    start = time.process_time()
    html = report_html(run)
    taken = time.process_time() - start

    assert len(html.encode()) < 5_000_000
    assert taken < 10.0  # it takes 0.7 s; far above, as the machine may be busy
    norms = figures_of(html)["optimizer-0-norm"]["data"]
    peak = max(np.nanmax(numbers_of(t["y"])) for t in norms if t.get("name") == "gradient norm")
    assert peak == run.optimizers[0].steps["total_norm"].max()


def test_eight_bidirectional_layers_of_two_optimizers_stay_small_too() -> None:
    run = pages.two_optimizers()
    crowded = [
        replace(
            part,
            times=tuple(
                replace(reading, part=f"l{layer}", step=step)
                for step in range(400)
                for layer in range(16)
                for reading in part.times[:1]
            ),
        )
        for part in run.optimizers
    ]
    html = report_html(replace(run, optimizers=tuple(crowded)))
    assert len(html.encode()) < 5_000_000
    assert "Drawn are those along which the gradient changes most." in html


def test_several_optimizers_have_a_section_each() -> None:
    page = Page(report_html(pages.two_optimizers()))
    assert {"optimizer-0", "optimizer-1", "optimizer-1-norm"} <= set(page.ids)
    assert "generator" in page.text
    assert "2 findings in 80 steps" in page.text


def test_steps_that_are_not_finite_are_marked() -> None:
    html = report_html(pages.nan_losses())
    marks = {
        key: next(t for t in figure["data"] if t.get("name") == "not finite")
        for key, figure in figures_of(html).items()
        if key in ("optimizer-0-loss", "optimizer-0-norm")
    }
    assert marks["optimizer-0-loss"]["x"] == list(range(150, 200))
    assert marks["optimizer-0-norm"]["x"] == [120, *range(150, 200)]
    assert "Not finite at 51 steps, first at step 120." in Page(html).text


def test_a_loss_that_nobody_told_is_neither_drawn_nor_called_broken() -> None:
    html = report_html(pages.with_columns(made_up_run(40), loss=np.full(40, np.nan)))
    assert "optimizer-0-loss" not in figures_of(html)
    assert "Not finite" not in html


def test_without_plotly_all_else_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Page(report_html(made_up_run(60)))
    monkeypatch.setattr(writer_module, "plotly_script", lambda: None)
    html = report_html(made_up_run(60))

    assert "pip install plotly" in html
    assert not figures_of(html)
    assert len(html) < 100_000
    page = Page(html)
    assert set(full.words) - {"The charts need JavaScript; all else is here."} <= set(page.words)


def test_what_changed_since_another_run() -> None:
    run, other = made_up_run(400), made_up_run(300, seed=5)
    only_there = Finding(Pathology.UNDERFLOW, Severity.INFO, "fc", 3, {}, "Too small.")
    other = pages.with_part(other, findings=(other.findings[0], only_there))
    settings = {**other.info.settings, "mode": "observe"}
    other = replace(other, info=replace(other.info, name="version_9", settings=settings))
    html = report_html(run, other)
    text = Page(html).text.partition("What changed since version_9 Numbers")[2]

    assert "Steps 300 400" in text
    assert "mode observe protect" in text
    assert "Half-life in encoder.rnn/l0 1.6 1.6" in text
    assert "New findings critical exploding in model No longer found info underflow in fc" in text
    assert "Found in both warning vanishing_in_time in encoder.rnn" in text
    assert "layer_depth" not in text
    for key in ("optimizer-0-loss", "optimizer-0-norm"):
        names = [trace.get("name") for trace in figures_of(html)[key]["data"]]
        assert "version_9" in names


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    assert write_report(pages.healthy(), path) == path
    assert path.read_text(encoding="utf-8") == report_html(pages.healthy())

    before = path.read_bytes()

    def refuse(self: Path, target: Path) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk is full"):
        write_report(made_up_run(20), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
