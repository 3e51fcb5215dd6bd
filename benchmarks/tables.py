"""Numbers in tables, pages and JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def shown(value: float | None, digits: int = 2) -> str:
    """A number for a table."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, of which the first row is the header."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def counted(number: int, name: str) -> str:
    """``"1 seed"``, ``"2 seeds"``."""
    return f"{number} {name}" + "s" * (number != 1)


def joined(parts: Sequence[str]) -> str:
    """``"a, b and c"``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def json_text(result: Mapping[str, Any], rounded: Callable[[float], float]) -> str:
    """An object as JSON, its lists with one entry a line, so that a change shows where it is.

    Args:
        result: Plain values.
        rounded: As many digits of a number as are to be kept; ``null`` stands for NaN and infinity.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        if isinstance(value, float):
            return rounded(value) if math.isfinite(value) else None
        return value

    def lines(rows: list[Any]) -> str:
        return "[\n  " + ",\n  ".join(json.dumps(plain(row)) for row in rows) + "\n ]"

    parts = [
        f'"{name}": {lines(value) if isinstance(value, list) else json.dumps(plain(value))}'
        for name, value in result.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"
