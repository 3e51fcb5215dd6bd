"""Makes the pictures of a report that the documentation shows.

python -m tests.record.html_report.screenshots docs/images
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lightning_gradguard.record.html_report import write_report
from tests.record.html_report.browser import opened, running_chromium
from tests.record.runs import made_up_run

WIDTH = 1100
# From the verdict to the first heat map.
HEIGHT = 2790


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch, running_chromium() as browser:
        report = write_report(made_up_run(2000, 12, seed=1), Path(scratch) / "report.html")
        for theme in ("light", "dark"):
            look = {"color_scheme": theme, "viewport": {"width": WIDTH, "height": HEIGHT}}
            with opened(browser, report, **look) as shown:
                shown.page.screenshot(path=folder / f"report_{theme}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
