"""Lays a report out as HTML, and writes it."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from lightning_gradguard.diagnose.remedies import without_remedy
from lightning_gradguard.record.finding_groups import name_of, since_when
from lightning_gradguard.record.html_report.page import make_page
from lightning_gradguard.record.html_report.plotly_js import digest_of, plotly_script
from lightning_gradguard.record.html_report.words import number, plural
from lightning_gradguard.record.run_history import RunHistory
from lightning_gradguard.record.whole_files import replace_whole

# Causes that are told in full; more stand in one line each, up to the second number.
MAX_IN_FULL = 20
MAX_GROUPS = 200


def report_html(run: RunHistory, compare: RunHistory | None = None) -> str:
    """One page of HTML that holds all that it needs: style, script, numbers, plotly.js.

    The same run gives the same page. It names no address and its content security policy lets
    nothing be loaded and no script run but its own two, which it knows by their digest. Without
    plotly it says so in place of the charts, and without JavaScript it lacks only them.

    Args:
        run: What the page is about.
        compare: Another run; the page says what changed since it, and draws it behind this one.

    Example:
        >>> from lightning_gradguard.record.run_history import OptimizerHistory, RunInfo
        >>> run = RunHistory(RunInfo("demo"), (OptimizerHistory(counts={"steps": 600}),))
        >>> "Nothing was found in 600 steps; no step was touched." in report_html(run)
        True
    """
    script = _resource("report.js")
    page = make_page(run, compare)
    plotly = plotly_script() if page.figures else None
    return _template().render(
        page=page,
        style=Markup(_resource("report.css")),  # ours, as the script is: not to be escaped
        script=Markup(script),
        script_digest=digest_of(script),
        plotly=plotly,
        max_in_full=MAX_IN_FULL,
        max_groups=MAX_GROUPS,
    )


def write_report(run: RunHistory, path: Path, compare: RunHistory | None = None) -> Path:
    """Write :func:`report_html` to a file, as a whole or not at all.

    Args:
        run: What the page is about.
        path: Where to; its folder is made. A file that is there is replaced.
        compare: Another run, to say what changed since it.

    Returns:
        The path.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> write_report(RunHistory(), Path(tempfile.mkdtemp()) / "report.html").name
        'report.html'
    """
    html = report_html(run, compare)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(path, html.encode())
    return path


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {
        "sort_keys": True,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    environment.filters |= {
        "number": number,
        "plural": plural,
        "message": without_remedy,
        "name": name_of,
        "since": since_when,
    }
    return environment.from_string(_resource("report.html"))


@lru_cache
def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
