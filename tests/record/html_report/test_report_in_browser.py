"""A real browser opens the page, draws it, and asks nobody for anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_gradguard.record.html_report import write_report
from lightning_gradguard.record.html_report import writer as writer_module
from lightning_gradguard.record.html_report.plotly_js import plotly_script
from tests.record.html_report import pages
from tests.record.html_report.browser import opened
from tests.record.html_report.pages import EVIL, KINDS
from tests.record.runs import made_up_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(plotly_script() is None, reason="plotly is not installed"),
]

DESKTOP = {"width": 1200, "height": 900}
PHONE = {"width": 360, "height": 740}
# Of each chart: whether it has lines or marks with a shape, or the picture of a heat map.
DRAWN = """() => [...document.querySelectorAll(".plot")].map(plot => [plot.id,
  plot.querySelectorAll(".scatterlayer path[d], .heatmaplayer image, .hm image").length])"""
COLORS = """() => [getComputedStyle(document.body).backgroundColor,
  getComputedStyle(document.querySelector(".plot .xtick text")).fill,
  getComputedStyle(document.querySelector("[id$=-norm] .scatterlayer .js-line")).stroke]"""
WIDTHS = "() => [...document.querySelectorAll('.plot')].map(plot => plot._fullLayout.width)"
NAMES = "() => [...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[0].innerText)"


def eventually(holds: Callable[[], bool]) -> None:
    """Waits for it; playwright's own way evaluates text, which the page's policy forbids."""
    end = time.monotonic() + 20.0
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(made_up_run(1000, 12), path, made_up_run(800, 12, seed=3))


@pytest.mark.parametrize("kind", KINDS)
def test_charts_are_drawn_without_complaint_or_request(
    chromium: Any, tmp_path: Path, kind: str
) -> None:
    run = KINDS[kind]()
    path = write_report(run, tmp_path / "report.html")
    has_charts = kind not in ("empty", "nothing")
    with opened(chromium, path, wait=has_charts, viewport=DESKTOP) as shown:
        assert shown.complaints == []
        assert shown.requests == [path.as_uri()]
        drawn = dict(shown.page.evaluate(DRAWN))
        assert bool(drawn) == has_charts
        assert all(drawn.values()), drawn


def test_a_bad_name_stays_text_in_page_and_charts(chromium: Any, tmp_path: Path) -> None:
    path = write_report(pages.evil(), tmp_path / "report.html", pages.evil())
    with opened(chromium, path, viewport=DESKTOP) as shown:
        page = shown.page
        assert shown.complaints == []
        assert page.locator("script").count() == 4  # the figures, plotly packed and unpacked, ours
        assert page.locator("h1").inner_text() == EVIL
        ticks = page.locator("#optimizer-0-layer-norms .ytick text").all_text_contents()
        assert ticks[0].endswith("--loss")
        plot = page.locator("#optimizer-0-layer-norms .nsewdrag")
        plot.hover()
        hover = page.locator("#optimizer-0-layer-norms .hovertext").first.text_content()
        assert "<script>alert(1)</script>&\"'" in hover


def test_the_table_is_sorted_by_click_and_by_keyboard(chromium: Any, report: Path) -> None:
    with opened(chromium, report, viewport=DESKTOP) as shown:
        page = shown.page
        assert page.evaluate(NAMES)[:2] == ["blocks.0.linear", "blocks.1.linear"]
        median = page.locator(".sortable th", has_text="Median")

        median.get_by_role("button").click()
        assert median.get_attribute("aria-sort") == "descending"
        values = [
            float(row)
            for row in page.locator(".sortable tbody td:nth-child(2)").evaluate_all(
                "cells => cells.map(cell => cell.dataset.value)"
            )
        ]
        assert values == sorted(values, reverse=True)

        page.keyboard.press("Enter")  # the button still has the focus
        assert median.get_attribute("aria-sort") == "ascending"
        assert page.evaluate(NAMES)[0] == "blocks.11.linear"

        page.locator(".sortable th", has_text="Layer").get_by_role("button").focus()
        page.keyboard.press("Space")
        assert page.locator("[aria-sort]").count() == 1
        assert page.evaluate(NAMES)[1:3] == ["blocks.1.linear", "blocks.2.linear"]


def test_the_theme_follows_the_system_and_the_button(chromium: Any, report: Path) -> None:
    with opened(chromium, report, viewport=DESKTOP, color_scheme="light") as shown:
        light = shown.page.evaluate(COLORS)
        shown.page.locator("#theme").click()
        dark = shown.page.evaluate(COLORS)
        assert all(a != b for a, b in zip(light, dark, strict=True))
        shown.page.reload()  # remembered for as long as the tab is open
        shown.page.wait_for_selector("html[data-charts]", state="attached")
        assert shown.page.evaluate(COLORS) == dark
    with opened(chromium, report, viewport=DESKTOP, color_scheme="dark") as shown:
        assert shown.page.evaluate(COLORS) == dark
        shown.page.emulate_media(color_scheme="light")
        eventually(lambda: shown.page.evaluate(COLORS) == light)
        shown.page.emulate_media(color_scheme="dark", media="print")
        eventually(lambda: shown.page.evaluate(COLORS)[2] == light[2])
        assert set(shown.page.evaluate(WIDTHS)) == {640}  # of A4 or letter paper
        assert shown.page.locator("#theme").is_hidden()
        assert all(dict(shown.page.evaluate(DRAWN)).values())


def test_zooming_into_one_chart_shows_the_same_steps_in_the_others(
    chromium: Any, report: Path
) -> None:
    with opened(chromium, report, viewport=DESKTOP) as shown:
        shown.page.evaluate(
            "Plotly.relayout('optimizer-0-loss', {'xaxis.range[0]': 100, 'xaxis.range[1]': 200})"
        )
        ranges = "id => document.getElementById(id).layout.xaxis.range.join()"
        for key in ("optimizer-0-norm", "optimizer-0-layer-norms", "optimizer-0-time0-map"):
            eventually(lambda key=key: shown.page.evaluate(ranges, key) == "100,200")
        assert shown.page.evaluate(ranges, "optimizer-0-time0-curve") != "100,200"
        assert shown.complaints == []


@pytest.mark.parametrize("kind", ["compared", "two optimizers", "bad names"])
def test_a_phone_needs_no_scrolling_sideways(
    chromium: Any, tmp_path: Path, report: Path, kind: str
) -> None:
    path = report if kind == "compared" else write_report(KINDS[kind](), tmp_path / "r.html")
    with opened(chromium, path, viewport=PHONE, is_mobile=True, has_touch=True) as shown:
        assert shown.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert all(dict(shown.page.evaluate(DRAWN)).values())
        assert shown.page.locator(".modebar-btn").count() == 0


def test_code_is_copied(chromium: Any, report: Path) -> None:
    rights = ["clipboard-read", "clipboard-write"]
    with opened(chromium, report, viewport=DESKTOP, permissions=rights) as shown:
        button = shown.page.locator(".code button").first
        button.click()
        eventually(lambda: button.inner_text() == "Copied")
        copied = shown.page.evaluate("navigator.clipboard.readText()")
        assert copied == "self.rnn = nn.LSTM(64, 128)"


def test_without_scripts_all_but_the_charts_is_there(chromium: Any, report: Path) -> None:
    with opened(chromium, report, wait=False, viewport=DESKTOP, java_script_enabled=False) as shown:
        text = shown.page.locator("main").inner_text()
        assert "1 of them critical" in text
        assert "The charts need JavaScript" in text
        assert "blocks.11.linear" in text
        assert shown.page.locator("button:visible").count() == 0


def test_a_frame_without_storage_shows_it_too(chromium: Any, report: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer.html"
    outer.write_text(f'<iframe sandbox="allow-scripts" src="{report.as_uri()}"></iframe>')
    with opened(chromium, outer, wait=False, viewport=DESKTOP) as shown:
        frame = shown.page.frames[1]
        frame.wait_for_selector("html[data-charts=drawn]", state="attached", timeout=60_000)
        frame.locator("#theme").click()
        assert not [text for text in shown.complaints if text.startswith("error")]


def test_without_plotly_nothing_is_amiss(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "plotly_script", lambda: None)
    path = write_report(made_up_run(60), tmp_path / "report.html")
    with opened(chromium, path, wait=False, viewport=DESKTOP) as shown:
        shown.page.locator(".sortable button").first.click()
        assert shown.complaints == []
        assert shown.page.locator(".plot").count() == 0


def test_it_prints(chromium: Any, report: Path, tmp_path: Path) -> None:
    with opened(chromium, report, viewport=DESKTOP, color_scheme="dark") as shown:
        pdf = shown.page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
        assert pdf.startswith(b"%PDF")
        assert shown.complaints == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_enough_contrast(chromium: Any, report: Path, theme: str) -> None:
    with opened(chromium, report, wait=False, viewport=DESKTOP, color_scheme=theme) as shown:
        for ground in ("--ground", "--raised"):
            for ink in ("ink", "muted", "accent", "good", "info", "warning", "critical"):
                pair = shown.page.evaluate(RESOLVED, [f"--{ink}", ground])
                assert contrast(*pair) >= 4.5, (ink, ground, pair)


RESOLVED = """names => names.map(name => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color.match(/[0-9]+/g).map(Number);
})"""


def contrast(first: list[int], second: list[int]) -> float:
    """As WCAG 2 defines it."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: list[int]) -> float:
    parts = [part / 255 for part in color]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
