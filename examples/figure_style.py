"""How the figures of the examples look."""

from __future__ import annotations

from typing import Any

INK = "#444444"
# Okabe and Ito's palette, which stays apart for every kind of color vision.
ORANGE, BLUE, GREEN, PINK, AMBER, SKY = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
STYLE: Any = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "legend.frameon": False,
}
