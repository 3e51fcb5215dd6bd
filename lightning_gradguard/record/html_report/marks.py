"""Marks of findings, actions and steps that were not finite, at a height of the chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lightning_gradguard.diagnose import Finding, Severity
from lightning_gradguard.record.finding_groups import name_of
from lightning_gradguard.record.html_report.charts import Dict
from lightning_gradguard.record.html_report.encoding import plotly_text
from lightning_gradguard.record.run_history import Floats, OptimizerHistory

# More marks than that run into each other; neighbors share one.
_MAX_MARKS = 120
_MAX_TEXTS = 3
_WIDTH = 60

# Step, and what to say about it.
_Event = tuple[float, str]


def event_marks(part: OptimizerHistory) -> Iterator[Dict]:
    """A line with a mark for every action and for every finding, with its sentence on hover.

    They are to be drawn before the values, which they would hide where both have a peak.
    """
    span = part.steps["step"][-1] - part.steps["step"][0]
    actions = [(float(action.step), action.message) for action in part.actions]
    yield from _marks("action", actions, span, "--action", "triangle-down", 0.98)
    for severity in sorted(Severity, reverse=True):
        found = [_event(finding) for finding in part.findings if finding.severity is severity]
        label = "critical finding" if severity is Severity.CRITICAL else severity.label
        yield from _marks(label, found, span, f"--{severity.label}", "diamond", 0.93)


def non_finite_marks(steps: Floats, what: str) -> Iterator[Dict]:
    """A mark at the top for each step without a finite value."""
    events = [(float(step), f"The {what} is not finite.") for step in steps[:_MAX_MARKS]]
    if len(steps) > _MAX_MARKS:
        chosen = np.linspace(0, len(steps) - 1, _MAX_MARKS).astype(int)
        events = [(float(steps[at]), f"The {what} is not finite.") for at in chosen]
    if events:
        yield _heads("not finite", events, "--critical", "x", 0.88)


def _event(finding: Finding) -> _Event:
    return float(finding.step), f"{name_of(finding)}: {finding.message}"


def _marks(
    name: str, events: Sequence[_Event], span: float, color: str, symbol: str, height: float
) -> Iterator[Dict]:
    if not events:
        return
    merged = _merged(events, span / _MAX_MARKS)
    places = [step for step, _ in merged]
    yield {
        "type": "scatter",
        "mode": "lines",
        "x": [at for step in places for at in (step, step, None)],
        "y": [end for _ in places for end in (0, height, None)],
        "yaxis": "y2",
        "line": {"color": color, "width": 1, "dash": "dot"},
        "opacity": 0.7,
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": name,
    }
    yield _heads(name, merged, color, symbol, height)


def _heads(name: str, events: Sequence[_Event], color: str, symbol: str, height: float) -> Dict:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "legendgroup": name,
        "legendrank": 2_000,
        "x": [step for step, _ in events],
        "y": [height] * len(events),
        "yaxis": "y2",
        "marker": {"color": color, "symbol": symbol, "size": 9},
        "text": [_hover(step, text) for step, text in events],
        "hoverinfo": "text",
    }


def _hover(step: float, text: str) -> str:
    return f"<b>step {step:,.0f}</b><br>{plotly_text(text, _WIDTH)}"


def _merged(events: Sequence[_Event], apart: float) -> list[_Event]:
    """Events that would be drawn over each other as one."""
    groups: list[list[_Event]] = []
    for event in sorted(events, key=lambda event: event[0]):
        if groups and event[0] - groups[-1][0][0] < apart:
            groups[-1].append(event)
        else:
            groups.append([event])
    return [(group[0][0], _together(group)) for group in groups]


def _together(group: Sequence[_Event]) -> str:
    texts = [text for _, text in group[:_MAX_TEXTS]]
    if len(group) > _MAX_TEXTS:
        left_out = len(group) - _MAX_TEXTS
        texts.append(f"… {left_out:,} more until step {group[-1][0]:,.0f}")
    return " ".join(texts)
