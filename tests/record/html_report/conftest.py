"""A headless Chromium for the whole folder, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.record.html_report.browser import chromium_path, running_chromium


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="playwright drives the browser")
    if chromium_path() is None:
        pytest.skip("no Chromium on the path: install chromium or google-chrome")
    with running_chromium() as browser:
        yield browser
