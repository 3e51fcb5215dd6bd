"""Loss and gradient norm over the steps, with what was found and done."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lightning_gradguard.record.html_report.charts import Chart, Dict, axis_title, layout, log_ticks
from lightning_gradguard.record.html_report.encoding import plotly_text, short_name, typed
from lightning_gradguard.record.html_report.marks import event_marks, non_finite_marks
from lightning_gradguard.record.html_report.thinning import medians, thin_line
from lightning_gradguard.record.html_report.words import median, number, plural
from lightning_gradguard.record.run_history import Floats, OptimizerHistory

_MEDIANS = 150
# From here on a linear axis would show a spike and nothing else.
_SPREAD_FOR_LOG = 30.0


def step_charts(
    key: str, part: OptimizerHistory, other: OptimizerHistory | None, name: str
) -> list[Chart]:
    """The loss, if it is known, and the gradient norm.

    Args:
        key: Begins the ids of the charts.
        part: What is drawn.
        other: Drawn behind it, of another run.
        name: What the other run is called.
    """
    if not len(part.steps["step"]):
        return []
    charts = [_norm_chart(f"{key}-norm", part, other, name)]
    if np.isfinite(part.steps["loss"]).any():
        charts.insert(0, _loss_chart(f"{key}-loss", part, other, name))
    return charts


def broken_losses(part: OptimizerHistory) -> Floats:
    """Steps whose loss was not finite.

    A loss that is NaN where the gradient is sound was not known, as in manual optimization.
    """
    loss, norm = part.steps["loss"], part.steps["total_norm"]
    broken: Floats = part.steps["step"][np.isinf(loss) | (np.isnan(loss) & ~np.isfinite(norm))]
    return broken


def broken_norms(part: OptimizerHistory) -> Floats:
    """Steps whose gradient was not finite."""
    broken: Floats = part.steps["step"][~np.isfinite(part.steps["total_norm"])]
    return broken


def _loss_chart(
    key: str, part: OptimizerHistory, other: OptimizerHistory | None, name: str
) -> Chart:
    step, loss = part.steps["step"], part.steps["loss"]
    broken = broken_losses(part)
    traces = [*event_marks(part), *_other("loss", other, name)]
    traces += [*_line("loss", step, loss, "--loss", other), *non_finite_marks(broken, "loss")]
    logarithmic = _wants_log(loss)
    y = {"title": axis_title("loss"), **({"type": "log"} if logarithmic else {})}
    return Chart(key, "Loss", _loss_caption(part, broken), _figure(traces, y, _span(part, other)))


def _norm_chart(
    key: str, part: OptimizerHistory, other: OptimizerHistory | None, name: str
) -> Chart:
    step, norm = part.steps["step"], part.steps["total_norm"]
    broken = broken_norms(part)
    traces = [*event_marks(part), *_other("total_norm", other, name)]
    traces += _line("gradient norm", step, norm, "--norm", other)
    limit = part.steps["clip_threshold"]
    if np.isfinite(limit).any():
        look = {"color": "--limit", "width": 1.5, "dash": "dash"}
        traces.append(_trace("clip threshold", *thin_line(step, limit), look))
    traces += non_finite_marks(broken, "gradient")
    y = {"title": axis_title("gradient norm"), "type": "log", "exponentformat": "power"}
    usable = np.log10(norm[np.isfinite(norm) & (norm > 0.0)])
    y |= log_ticks(usable.min(), usable.max()) if usable.size else {}
    return Chart(
        key, "Gradient norm", _norm_caption(part, broken), _figure(traces, y, _span(part, other))
    )


def _line(
    name: str,
    step: Floats,
    values: Floats,
    color: str,
    other: OptimizerHistory | None,
) -> Iterator[Dict]:
    """The values, and over many of them their median, which the eye can follow."""
    label = f"{name}, this run" if other else name
    if len(step) <= 2 * _MEDIANS:
        yield _trace(label, *thin_line(step, values), {"color": color, "width": 1.8})
        return
    yield {
        **_trace(label, *thin_line(step, values), {"color": color, "width": 1}),
        "opacity": 0.45,
        "showlegend": False,
    }
    yield _trace(label, *medians(step, values, _MEDIANS), {"color": color, "width": 2})


def _other(column: str, other: OptimizerHistory | None, name: str) -> Iterator[Dict]:
    if other is None or not np.isfinite(other.steps[column]).any():
        return
    step, values = other.steps["step"], other.steps[column]
    drawn = medians(step, values, _MEDIANS) if len(step) > 2 * _MEDIANS else (step, values)
    yield _trace(
        plotly_text(short_name(name)), *thin_line(*drawn), {"color": "--other", "width": 1.8}
    )


def _trace(name: str, step: Floats, values: Floats, line: Dict) -> Dict:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": typed(step),
        "y": typed(values),
        "line": line,
        "hovertemplate": "step %{x:,d}: %{y:.4~g}",
    }


def _figure(traces: list[Dict], y: Dict, steps: tuple[float, float]) -> Dict:
    # Marks stand above the values, which keep their part of the height to themselves.
    height = {"domain": [0, 1], "range": [0, 1], "fixedrange": True, "visible": False}
    y |= {"domain": [0, 0.86]}
    first, last = steps
    margin = 0.01 * (last - first) + 0.5  # half a mark
    x = {"title": axis_title("step"), "tickformat": ",d", "range": [first - margin, last + margin]}
    return {"data": traces, "layout": layout(x=x, y=y, yaxis2=height, height=340)}


def _span(part: OptimizerHistory, other: OptimizerHistory | None) -> tuple[float, float]:
    """The first and the last step that are drawn."""
    both = [part.steps["step"], *([other.steps["step"]] if other else [])]
    drawn = [steps for steps in both if len(steps)]
    return min(float(s[0]) for s in drawn), max(float(s[-1]) for s in drawn)


def _wants_log(values: Floats) -> bool:
    finite = values[np.isfinite(values)]
    return bool(finite.min() > 0.0 and finite.max() > _SPREAD_FOR_LOG * median(finite))


def _loss_caption(part: OptimizerHistory, broken: Floats) -> str:
    step, loss = part.steps["step"], part.steps["loss"]
    known = np.isfinite(loss)
    step, loss = step[known], loss[known]
    best = int(loss.argmin())
    words = (
        f"From {number(loss[0])} at step {step[0]:,.0f} to {number(loss[-1])} at step "
        f"{step[-1]:,.0f}; the lowest was {number(loss[best])} at step {step[best]:,.0f}."
    )
    return words + _broken_words(broken)


def _norm_caption(part: OptimizerHistory, broken: Floats) -> str:
    step, norm = part.steps["step"], part.steps["total_norm"]
    known = np.isfinite(norm)
    if not known.any():
        return f"No gradient norm was finite.{_broken_words(broken)}"
    top = int(np.where(known, norm, -np.inf).argmax())
    words = (
        f"Of the whole model before clipping: median {number(median(norm))}, largest "
        f"{number(norm[top])} at step {step[top]:,.0f}."
    )
    return words + _broken_words(broken)


def _broken_words(steps: Floats) -> str:
    if not len(steps):
        return ""
    return f" Not finite at {plural(len(steps), 'step')}, first at step {steps[0]:,.0f}."
