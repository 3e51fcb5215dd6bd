"""How the gradient travels through time: over the run, and as it was last measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.html_report.charts import Chart, Dict, axis_title, layout
from lightning_gradguard.record.html_report.encoding import typed
from lightning_gradguard.record.html_report.heat_maps import columns_within, heat_map
from lightning_gradguard.record.html_report.thinning import thin_matrix
from lightning_gradguard.record.html_report.words import number, plural
from lightning_gradguard.record.run_history import Floats, LayerMatrix, OptimizerHistory

# Two charts each: more of them make a page that nobody scrolls through.
MAX_DRAWN = 8
# What comes after so many horizons is noise of the arithmetic; a chart shows some steps even so.
_HORIZONS = 2.3
_LEAST_SHOWN = 10.0
_LARGEST = 1e300


def drawn_readings(part: OptimizerHistory) -> list[TimeReading]:
    """The newest readings whose curves are worth a chart, in the order of the model.

    Where there are many, those along whose sequences the gradient changes most.
    """
    usable = [reading for reading in part.latest_times if _has_curve(reading)]
    ranked = sorted(usable, key=_change, reverse=True)[:MAX_DRAWN]
    chosen = {reading.name for reading in ranked}
    return [reading for reading in usable if reading.name in chosen]


def time_charts(key: str, part: OptimizerHistory, cells: int) -> list[tuple[str, list[Chart]]]:
    """Of each module its name and its charts.

    Args:
        key: Begins the ids of the charts.
        part: What is drawn.
        cells: The most cells that each heat map may have.
    """
    charts = []
    for number_, reading in enumerate(drawn_readings(part)):
        past = [r for r in part.times if r.name == reading.name and _has_curve(r)]
        id_ = f"{key}-time{number_}"
        drawn = [_decay_curve(f"{id_}-curve", reading), _time_map(f"{id_}-map", past, cells)]
        charts.append((reading.name, drawn))
    return charts


def _has_curve(reading: TimeReading) -> bool:
    return any(0.0 < norm < _LARGEST for norm in reading.profile)


def _change(reading: TimeReading) -> float:
    """Orders of e by which the gradient changes on its way through the sequence."""
    rate = reading.decay_rate
    return abs(rate) * reading.timesteps if math.isfinite(rate) else 0.0


def _time_map(key: str, readings: Sequence[TimeReading], cells: int) -> Chart:
    bins = max(len(reading.profile) for reading in readings)
    # A shorter profile is a staircase over the same share of its sequence.
    stairs = [np.asarray(r.profile)[np.arange(bins) * len(r.profile) // bins] for r in readings]
    steps = np.asarray([float(reading.step) for reading in readings])
    matrix = LayerMatrix(("",) * bins, steps, np.stack(stairs))
    small = thin_matrix(matrix, columns=columns_within(cells, bins))
    lengths = {reading.timesteps for reading in readings}
    longest = max(lengths)
    same = len(lengths) == 1
    # Bins of a long sequence, or shares of sequences that differ, as timesteps or percent.
    scale = (longest if same else 100.0) / bins
    row = {"title": axis_title("timestep" if same else "% of the sequence"), "autorange": True}
    figure = heat_map(
        small,
        row=row,
        colors="Viridis",
        unit="norm",
        hover="timestep %{y:.0f}" if same else "%{y:.0f}% of the sequence",
        names=False,
    )
    figure["data"][0] |= {"y0": scale / 2.0 - (0.5 if same else 0.0), "dy": scale}
    figure["layout"]["height"] = 300
    caption = (
        f"Gradient norm at each timestep of sequences of {_lengths(lengths)}, in "
        f"{plural(len(readings), 'measurement')}. The darker one end is against the other, "
        "the less of the signal gets there."
    )
    return Chart(key, "Over the run", caption, figure)


def _lengths(lengths: set[int]) -> str:
    if len(lengths) == 1:
        return plural(min(lengths), "timestep")
    return f"{min(lengths):,} to {max(lengths):,} timesteps"


def _decay_curve(key: str, reading: TimeReading) -> Chart:
    norms: Floats = np.array(reading.profile, dtype=np.float64)
    if not reading.part.endswith("_reverse"):  # of which the last timestep comes first
        norms = norms[::-1]
    # What is beyond drawing, among them what would not be finite once it has doubled.
    norms[~((norms > 0.0) & (norms < _LARGEST))] = np.nan
    width = max(reading.timesteps, len(norms)) / len(norms)
    back: Floats = np.arange(len(norms), dtype=np.float64) * width
    curve: Dict = {
        "type": "scatter",
        "mode": "lines",
        "name": "measured",
        "x": typed(back),
        "y": typed(norms),
        "line": {"color": "--norm", "width": 2.4},
        "hovertemplate": "%{x:.0f} steps back: %{y:.3~e}<extra></extra>",
    }
    x: Dict = {"title": axis_title("steps back in time"), "rangemode": "tozero"}
    y = {"title": axis_title("gradient norm"), "type": "log", "exponentformat": "power"}
    words = decay_words(reading)
    shown = _part_to_show(reading)
    if shown < back[-1]:
        x["range"] = [-0.01 * shown, shown]
        y |= _range_of(norms[back <= shown])
        words += f" Drawn are the first {plural_steps(shown)}; zoom out for all."
    fit = _half_life_traces(reading, back, norms)
    figure = {"data": [curve, *fit], "layout": layout(x=x, y=y, height=300)}
    return Chart(key, f"At step {reading.step:,}", words, figure)


def _range_of(norms: Floats) -> Dict:
    """The range of an axis on which these can be seen."""
    logs = np.log10(norms[~np.isnan(norms)])
    if not logs.size:
        return {}
    margin = 0.05 * float(np.ptp(logs)) + 0.05
    return {"range": [float(logs.min()) - margin, float(logs.max()) + margin]}


def _part_to_show(reading: TimeReading) -> float:
    """Steps back in time in which a gradient that vanishes falls by seven orders of magnitude."""
    vanishes = reading.decay_rate < 0.0
    return max(math.ceil(_HORIZONS * reading.horizon), _LEAST_SHOWN) if vanishes else math.inf


def _half_life_traces(reading: TimeReading, back: Floats, norms: Floats) -> list[Dict]:
    """The measured rate as a line, and the half-life as a step from the curve's beginning."""
    rate, half = reading.decay_rate, reading.half_life
    if not math.isfinite(rate) or not math.isfinite(half):
        return []
    first = int(np.flatnonzero(~np.isnan(norms))[0])
    start, top = float(back[first]), float(norms[first])
    # Only as far as the curve itself goes, up or down, but for one half-life at least.
    extreme = float(np.nanmin(norms) if rate < 0.0 else np.nanmax(norms))
    reach = (math.log(extreme) - math.log(top)) / rate
    end = min(float(back[-1]), start + max(reach, half))
    line = {
        "name": f"{rate:+.3f} per step",
        "x": [start, end],
        "y": [top, math.exp(math.log(top) + rate * (end - start))],
        "line": {"color": "--limit", "width": 1.6, "dash": "dash"},
        "hoverinfo": "skip",
    }
    vanishes = rate < 0.0
    step = {
        "name": f"{'half-life' if vanishes else 'doubles in'} {plural_steps(half)}",
        "x": [start, start + half, start + half],
        "y": [top, top, top * (0.5 if vanishes else 2.0)],
        "fill": "toself",
        "line": {"color": "--limit", "width": 2},
        "hoverinfo": "name",
    }
    return [{"type": "scatter", "mode": "lines", **trace} for trace in (line, step)]


def decay_words(reading: TimeReading) -> str:
    """What the curve shows, in a sentence or two."""
    if not math.isfinite(reading.decay_rate):
        return reading.note or "No decay rate is known."
    if not math.isfinite(reading.half_life):
        return "The gradient keeps its size through time."
    verb = "halves" if reading.decay_rate < 0.0 else "doubles"
    words = (
        f"The gradient {verb} every {plural_steps(reading.half_life)} back in time; the sequence "
        f"has {plural(reading.timesteps, 'timestep')}."
    )
    if reading.decay_rate < 0.0 and reading.horizon < reading.timesteps:
        words += f" After {plural_steps(reading.horizon)} a thousandth of it is left."
    return words


def plural_steps(steps: float) -> str:
    """A number of steps that need not be whole.

    Example:
        >>> plural_steps(1.612), plural_steps(1.0), plural_steps(1234.5)
        ('1.6 steps', '1 step', '1,234 steps')
    """
    if steps >= 100.0:
        return f"{steps:,.0f} steps"
    text = number(round(steps, 1))
    return f"{text} step{'' if text == '1' else 's'}"
