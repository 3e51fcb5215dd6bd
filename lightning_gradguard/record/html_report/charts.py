"""What every chart of a report has in common: a figure of plain dicts, and words for it.

A color that begins with two dashes is a variable of the style sheet; the page's script fills it in,
so that the charts follow the theme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Dict = dict[str, Any]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_CLEAR = "rgba(0,0,0,0)"


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        key: Its id in the page.
        title: What it shows.
        caption: What is to be seen in it, in words.
        figure: ``data`` and ``layout`` for plotly.
    """

    key: str
    title: str
    caption: str
    figure: Dict

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.figure["layout"]["height"])


def layout(*, x: Dict, y: Dict, height: int = 320, **more: Any) -> Dict:
    """A layout in the colors and the type of the page.

    Args:
        x: What is particular to the horizontal axis.
        y: What is particular to the vertical axis.
        height: In pixels.
        more: Other entries, as plotly names them.
    """
    return {
        "height": height,
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "font": {"family": FONT, "size": 12, "color": "--muted"},
        "margin": {"l": 60, "r": 12, "t": 34, "b": 48},
        "hoverlabel": {
            "bgcolor": "--raised",
            "bordercolor": "--line",
            "align": "left",
            "font": {"family": FONT, "size": 12, "color": "--ink"},
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "font_size": 12},
        "hovermode": "closest",
        "modebar": {"bgcolor": _CLEAR, "color": "--muted", "activecolor": "--ink"},
        "xaxis": _axis(**x),
        "yaxis": _axis(automargin=True, **y),
        **more,
    }


def axis_title(text: str) -> Dict:
    """The name of an axis."""
    return {"text": text, "standoff": 8}


def log_ticks(low: float, high: float) -> Dict:
    """Ticks at whole powers of ten, where there are two of them between these logarithms."""
    return {"dtick": max(1, round((high - low) / 8))} if high - low > 1.5 else {}


def color_bar(title: str, low: float, high: float) -> Dict:
    """The scale of a heat map whose colors are logarithms between ``low`` and ``high``."""
    return {
        "thickness": 10,
        "len": 1,
        "outlinewidth": 0,
        "xpad": 6,
        "ypad": 0,
        "tickprefix": "10<sup>",
        "ticksuffix": "</sup>",
        "title": {"text": title, "side": "right"},
        **log_ticks(low, high),
    }


def _axis(**particular: Any) -> Dict:
    return {
        "gridcolor": "--line",
        "linecolor": "--line",
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "tickcolor": "--line",
        "ticklen": 4,
        **particular,
    }
