"""Values as JSON knows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain_values(value: Any) -> Any:
    """Make ``value`` valid JSON: NaN and infinities become the strings "nan", "inf", "-inf".

    Example:
        >>> plain_values({"loss": float("nan"), "norms": (1.0, float("-inf"))})
        {'loss': 'nan', 'norms': [1.0, '-inf']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    return value
