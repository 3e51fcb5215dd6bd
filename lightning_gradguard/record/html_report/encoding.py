"""Numbers and names in the forms that plotly.js and the page's own script read."""

from __future__ import annotations

import base64
import html
import textwrap
from typing import Any

import numpy as np

from lightning_gradguard.record.run_history import Floats

# Codes 0 to 254 span the range of a heat map; this one is a cell without a value.
_MISSING = 255


def typed(values: Floats) -> dict[str, str]:
    """A plotly typed array, which is shorter than the same numbers as text.

    In double precision, as a loss that diverges may not fit into single.

    Example:
        >>> typed(np.array([1.0, 2.0]))
        {'dtype': 'f8', 'bdata': 'AAAAAAAA8D8AAAAAAAAAQA=='}
    """
    return {"dtype": "f8", "bdata": _base64(values.astype("<f8"))}


def quantized(values: Floats) -> dict[str, Any]:
    """A matrix in one byte a cell; the page's script makes numbers of it again.

    The range of the finite values is divided into 254 parts: of a heat map over six decades, each
    is 6% of a value. Infinities take the code of the nearest finite value, NaN has its own.

    Example:
        >>> coded = quantized(np.array([[0.0, 1.0], [np.nan, np.inf]]))
        >>> list(base64.b64decode(coded["codes"])), coded["low"], coded["high"], coded["columns"]
        ([0, 254, 255, 254], 0.0, 1.0, 2)
    """
    finite = values[np.isfinite(values)]
    low, high = (finite.min().item(), finite.max().item()) if finite.size else (0.0, 1.0)
    share = (np.clip(values, low, high) - low) / ((high - low) or 1.0)
    codes = np.where(np.isnan(values), _MISSING, np.rint(share * (_MISSING - 1)))
    return {
        "codes": _base64(codes.astype(np.uint8)),
        "columns": values.shape[1],
        "low": low,
        "high": high,
    }


def plotly_text(text: str, width: int = 0) -> str:
    """Text in which plotly sees no markup of its own: it reads a subset of HTML in all labels.

    Args:
        text: As it should be read.
        width: Longer lines are broken; 0 for never.

    Example:
        >>> plotly_text("a <b> & c")
        'a &lt;b&gt; &amp; c'
    """
    lines = textwrap.wrap(text, width) if width else [text]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def short_name(name: str, width: int = 24) -> str:
    """The end of a long path, which tells layers apart.

    Example:
        >>> short_name("model.encoder.blocks.11.linear", 18)
        '….blocks.11.linear'
    """
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _base64(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
