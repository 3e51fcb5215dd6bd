"""Numbers and times, as short as they stay readable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone


def number(value: float) -> str:
    """Three digits.

    Example:
        >>> number(0.034567), number(12345.0), number(float("nan"))
        ('0.0346', '1.23e+04', 'nan')
    """
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Of hours, minutes and seconds the two largest that count.

    Example:
        >>> duration(7), duration(754), duration(45_296), duration(300_000)
        ('7 s', '12 min 34 s', '12 h 34 min', '3 d 11 h')
    """
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def seconds_between(before: str, now: datetime) -> float:
    """From a time in ISO 8601 until now; NaN where it is not a time.

    Example:
        >>> now = datetime(2026, 1, 2, 3, 5, tzinfo=timezone.utc)
        >>> seconds_between("2026-01-02T03:04:05+00:00", now)
        55.0
    """
    try:
        then = datetime.fromisoformat(before)
    except ValueError:
        return math.nan
    return (now - then.replace(tzinfo=then.tzinfo or timezone.utc)).total_seconds()


def count_words(counts: Mapping[str, int]) -> str:
    """What was done to steps, without what never was.

    Example:
        >>> count_words({"steps": 400, "skipped_steps": 1, "clipped_steps": 0, "rollbacks": 2})
        '1 skipped, 2 rollbacks'
    """
    named = {name.removesuffix("_steps"): count for name, count in counts.items()}
    left_out = ("steps", "findings")
    return ", ".join(f"{c:,} {name}" for name, c in named.items() if c and name not in left_out)
