"""What was done and found, as marks along the steps. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gradguard.diagnose import Severity
from lightning_gradguard.record._plot_axes import FINDING, color
from lightning_gradguard.record._plot_data import thinned
from lightning_gradguard.respond.actions import ActionKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_gradguard.record.run_history import OptimizerHistory

_INK = "#444444"
_ACTIONS: Mapping[ActionKind, tuple[str, str]] = {
    ActionKind.SKIP: ("step skipped", "s"),
    ActionKind.TIGHTEN: ("cap tightened", "v"),
    ActionKind.BACK_OFF: ("learning rate cut", "X"),
    ActionKind.RECOVER: ("learning rate recovers", "^"),
    ActionKind.ROLL_BACK: ("weights put back", "<"),
    ActionKind.BOOST: ("layers boosted", ">"),
    ActionKind.STOP: ("run stopped", "8"),
}
_FINDING_SHAPES = ("D", "P", "*", "p", "h", "d", "H")
_ROW_HEIGHT = 0.065  # of the axes, for the marks of one kind
_MOST_HEIGHT = 0.45  # for all of them


@dataclass(frozen=True)
class _Events:
    """What is marked in one row.

    Attributes:
        label: For the legend.
        shape: Of the marks.
        color: Theirs.
        steps: Where they are.
        spans: From where to where lines last.
    """

    label: str
    shape: str
    color: str
    steps: list[float]
    spans: Sequence[tuple[float, float]] = ()


def mark_events(ax: Axes, part: OptimizerHistory, broken: Sequence[float]) -> None:
    """Mark what was done and found, and steps that were not finite, in a band at the top.

    Findings that are no more than a symptom (`INFO`) are left out.

    Args:
        ax: Axes whose limits are set; the upper one is raised to make room.
        part: What happened.
        broken: Steps with a gradient norm that is not finite.
    """
    left, right = ax.get_xlim()
    rows = [*_actions_done(part), *_findings_made(part, left, right)]
    if len(broken):
        rows.append(_Events("norm not finite", "x", color(FINDING), list(broken)))
    if not rows:
        return
    each = min(_ROW_HEIGHT, _MOST_HEIGHT / len(rows))
    _make_room(ax, each * len(rows) + 0.02)
    across = ax.get_xaxis_transform()
    for place, row in enumerate(rows):
        height = 1.0 - each * (place + 0.5)
        steps = thinned(row.steps, right - left)
        line: dict[str, Any] = {"color": row.color, "transform": across}
        ax.vlines(steps, 0.0, height, linewidth=0.4, alpha=0.5, **line)
        for span in row.spans:
            ax.plot(span, [height, height], linewidth=0.8, **line)
        edge = 0.8 if row.shape == "x" else 0.0
        marks: dict[str, Any] = {
            "marker": row.shape,
            "markersize": 4.0,
            "markeredgewidth": edge,
            **line,
        }
        ax.plot(steps, [height] * len(steps), linestyle="none", label=row.label, **marks)
    ax.set_xlim(left, right)


def _actions_done(part: OptimizerHistory) -> Iterator[_Events]:
    for kind, (label, shape) in _ACTIONS.items():
        steps = [float(action.step) for action in part.actions if action.kind is kind]
        if steps:
            yield _Events(label, shape, _INK, steps)


def _findings_made(part: OptimizerHistory, left: float, right: float) -> Iterator[_Events]:
    findings = [f for f in part.findings if f.severity >= Severity.WARNING]
    pathologies = dict.fromkeys(finding.pathology for finding in findings)
    for pathology, shape in zip(pathologies, itertools.cycle(_FINDING_SHAPES)):
        alike = [finding for finding in findings if finding.pathology is pathology]
        spans = [
            (
                max(left, f.step if f.since is None else f.since),
                right if f.until is None else f.until,
            )
            for f in alike
        ]
        label = pathology.value.replace("non_", "non-").replace("_", " ")
        steps = [float(finding.step) for finding in alike]
        yield _Events(label, shape, color(FINDING), steps, spans)


def _make_room(ax: Axes, share: float) -> None:
    """Raise the upper limit of a logarithmic axis, so that what is drawn stays below the band."""
    bottom, top = np.log10(ax.get_ylim())
    ax.set_ylim(top=10.0 ** (bottom + (top - bottom) / (1.0 - share)))
