"""A real browser that opens reports, and keeps what it complained of and asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium_path() -> str | None:
    """Where a Chromium is installed, if one is."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass
class Opened:
    """A page, what its console said, and which addresses it asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def running_chromium() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, *, wait: bool = True, **context: Any) -> Iterator[Opened]:
    """A report in a fresh context, once its charts are drawn.

    Args:
        browser: From :func:`running_chromium`.
        path: Of the report.
        wait: Whether there are charts to wait for.
        context: Of playwright's context: viewport, color_scheme, ...
    """
    session = browser.new_context(**context)
    page = session.new_page()
    shown = Opened(page)
    page.on("console", lambda message: shown.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: shown.complaints.append(f"error: {error}"))
    page.on("request", lambda request: shown.requests.append(request.url))
    page.goto(path.as_uri())
    if wait:
        page.wait_for_selector("html[data-charts]", timeout=60_000, state="attached")
    yield shown
    session.close()
