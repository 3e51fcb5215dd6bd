"""The result as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.timesteps.results import TARGETS

_PROBES = ("asleep", "cheap")
_OURS, _OTHER, _LIMIT = "#0b6e4f", "#8a8f98", "#b3261e"


class _Bar(NamedTuple):
    label: str
    value: float
    quartiles: tuple[float, float]
    ours: bool


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Draw added time of both measurements for each kind of module; returns ``path``."""
    panels = (
        (
            "Cheap:\nadded time, % of the step",
            _cheap_bars(result),
            100 * (TARGETS["cheap"] - 1),
            "{:+.1f}",
        ),
        (
            "One exact measurement and its alternative:\nin training steps",
            _exact_bars(result),
            TARGETS["exact"],
            "{:.2f}",
        ),
    )
    rows = max(len(bars) for _, bars, _, _ in panels)
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.8 + 0.27 * rows), layout="constrained")
    for panel, (title, bars, limit, pattern) in zip(axes, panels, strict=True):
        _draw(panel, bars, limit, pattern)
        panel.set_title(title, fontsize=9)
    settings, machine = result["settings"], result["machine"]
    shape = settings["shape"]
    figure.suptitle(
        f"Gradients through time, T={shape['timesteps']}, B={shape['sequences']}, "
        f"hidden {shape['hidden_size']}, {machine.get('gpu', machine['cpu'])}, "
        f"torch {machine['packages']['torch']}, {machine['torch_threads']} thread",
        fontsize=10,
    )
    figure.supxlabel("medians and quartiles of paired turns; dotted: target", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _cheap_bars(result: Mapping[str, Any]) -> list[_Bar]:
    clock = result["settings"]["clock"]
    bars = []
    for kind, by_inputs in result["cheap"].items():
        for inputs, entries in by_inputs.items():
            names = {"control": "no probe", "asleep": "asleep", "cheap": "on every step"}
            if inputs == "data":
                names = {**names, "input_gradient": "dL/dx without probe"}
            bars += [
                _bar(
                    f"{kind}, {inputs}: {text}", entries[name][clock], name in _PROBES, percent=True
                )
                for name, text in names.items()
            ]
        if kind in result.get("trainer", {}):
            entry = result["trainer"][kind]["auto"][clock]
            bars.append(
                _bar(f"{kind}, in a Trainer: GradGuard (cheap)", entry, ours=True, percent=True)
            )
    return bars


def _exact_bars(result: Mapping[str, Any]) -> list[_Bar]:
    clock = result["settings"]["clock"]
    bars = []
    for kind, entries in result["exact"].items():
        bars += [
            _bar(f"{kind}: exact, all of it", entries["exact"][clock], ours=True, less=1),
            _bar(f"{kind}: adjoint, whole batch", entries["adjoint"][clock], ours=True),
            _bar(f"{kind}: unrolled cells, a step", entries["unrolled"][clock], ours=False),
        ]
    return bars


def _bar(
    label: str, summary: Mapping[str, Any], ours: bool, *, less: float = 0.0, percent: bool = False
) -> _Bar:
    values = [summary["median"] - less, *(q - less for q in summary["quartiles"])]
    if percent:
        values = [100 * (value - 1) for value in values]
    return _Bar(label, values[0], (values[1], values[2]), ours)


def _draw(axes: Axes, bars: Sequence[_Bar], limit: float, pattern: str) -> None:
    for row, bar in enumerate(bars):
        axes.barh(row, bar.value, color=_OURS if bar.ours else _OTHER, height=0.62, alpha=0.85)
        axes.plot(bar.quartiles, [row, row], color="#222222", linewidth=1.2)
        axes.annotate(
            pattern.format(bar.value),
            (max(bar.value, bar.quartiles[1], 0), row),
            xytext=(4, 0),
            fontsize=8,
            va="center",
            textcoords="offset points",
        )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.axvline(limit, color=_LIMIT, linewidth=0.8, linestyle=":")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
