"""Heat maps over the steps: of layers, and of timesteps."""

from __future__ import annotations

import numpy as np

from lightning_gradguard.record.html_report.charts import (
    Chart,
    Dict,
    axis_title,
    color_bar,
    layout,
)
from lightning_gradguard.record.html_report.encoding import (
    plotly_text,
    quantized,
    short_name,
    typed,
)
from lightning_gradguard.record.html_report.thinning import MAX_COLUMNS, MAX_ROWS, thin_matrix
from lightning_gradguard.record.html_report.words import median, number
from lightning_gradguard.record.run_history import Floats, LayerMatrix, OptimizerHistory

# Below and above them lie single cells, which would take the colors from all others.
_PERCENTILES = (0.5, 99.5)
_MAX_LABELS = 24
_ROW_HEIGHT = 15
_HEIGHTS = (110, 560)


def layer_maps(key: str, part: OptimizerHistory, cells: int) -> list[Chart]:
    """Gradient norm and relative update of each layer over the steps, as far as they are known.

    Args:
        key: Begins the ids of the charts.
        part: What is drawn.
        cells: The most cells that each may have.
    """
    charts = []
    if has_cells(part.layers):
        charts.append(
            _layer_map(f"{key}-layer-norms", "Gradient norm of each layer", part.layers, cells)
        )
    if has_cells(part.updates):
        title = "Relative update of each layer"
        charts.append(_layer_map(f"{key}-layer-updates", title, part.updates, cells))
    return charts


def has_cells(matrix: LayerMatrix) -> bool:
    """Whether there is anything to draw."""
    return bool(matrix.values.size)


def heat_map(
    matrix: LayerMatrix, *, row: Dict, colors: str, unit: str, hover: str, names: bool
) -> Dict:
    """The figure of the logarithm of a matrix.

    Args:
        matrix: Values above 0; 0 and infinity take the colors of the ends.
        row: What is particular to the vertical axis.
        colors: A color scale of plotly's.
        unit: What the colors mean.
        hover: What a cell says first, as a template of plotly's.
        names: Whether hovering tells the name of the row.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(matrix.values.T)
    trace: Dict = {
        "type": "heatmap",
        "x": typed(matrix.steps),
        "z": quantized(logs),
        "colorscale": colors,
        "hovertemplate": f"{hover}<br>step %{{x:,d}}: 10^%{{z:.2f}}<extra></extra>",
        "hoverongaps": False,
    }
    finite = logs[np.isfinite(logs)]
    if finite.size:
        low, high = np.percentile(finite, _PERCENTILES).tolist()
        high = max(high, low + 1e-3)
        trace |= {"zmin": low, "zmax": high, "colorbar": color_bar(unit, low, high)}
    if names:
        trace["rows"] = [plotly_text(name) for name in matrix.names]
    least, most = _HEIGHTS
    height = min(most, least + _ROW_HEIGHT * len(matrix.names))
    x = {"title": axis_title("step"), "tickformat": ",d", "showgrid": False}
    y = {"autorange": "reversed", "showgrid": False, **row}
    margin = {"l": 60, "r": 12, "t": 12, "b": 48}
    return {"data": [trace], "layout": layout(x=x, y=y, height=height, margin=margin)}


def columns_within(cells: int, rows: int) -> int:
    """How many columns a map of so many rows may have."""
    return max(1, min(MAX_COLUMNS, cells // max(1, min(rows, MAX_ROWS))))


def _layer_map(key: str, title: str, matrix: LayerMatrix, cells: int) -> Chart:
    small = thin_matrix(matrix, columns=columns_within(cells, len(matrix.names)))
    updates = key.endswith("updates")
    figure = heat_map(
        small,
        row=_name_ticks(small.names),
        colors="Cividis" if updates else "Viridis",
        unit="‖ΔW‖ / ‖W‖" if updates else "norm",
        hover="%{text}",
        names=True,
    )
    return Chart(key, title, _caption(matrix), figure)


def _name_ticks(names: tuple[str, ...]) -> Dict:
    """Names at some of the rows, as many as can be read."""
    at = range(0, len(names), -(-len(names) // _MAX_LABELS))
    return {
        "tickmode": "array",
        "tickvals": list(at),
        "ticktext": [plotly_text(short_name(names[row])) for row in at],
    }


def _caption(matrix: LayerMatrix) -> str:
    last: Floats = matrix.values[-1]
    words = (
        f"{len(matrix.names):,} layers from the input (top) to the output (bottom) "
        f"at {len(matrix.steps):,} steps."
    )
    known = np.isfinite(last)
    if not known.any():
        return words
    low = int(np.where(known, last, np.inf).argmin())
    high = int(np.where(known, last, -np.inf).argmax())
    return (
        f"{words} At last, the smallest is {number(last[low])} in {matrix.names[low]}, the largest "
        f"{number(last[high])} in {matrix.names[high]}; the median is {number(median(last))}."
        f"{_ends(matrix.values)}"
    )


def _ends(values: Floats) -> str:
    """What the colors cannot tell."""
    words = ""
    if (values == 0.0).any():
        words += " Exactly 0 has the color of the smallest."
    if np.isinf(values).any():
        words += " Infinity has the color of the largest."
    return words
