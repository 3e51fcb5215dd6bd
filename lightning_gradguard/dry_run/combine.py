"""Measurements of several batches as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_gradguard.measure.student_t import student_t
from lightning_gradguard.readings import TimeReading

_Key = tuple[str, str, str]


def combine_readings(batches: Sequence[Sequence[TimeReading]]) -> tuple[TimeReading, ...]:
    """One reading for each layer and direction, from those of each batch.

    The rate is the mean over the batches. Where two or more know it, its error comes from their
    spread (Student's t): the batches are independent. Profiles are root mean squares over the
    batches with the longest sequences.

    Args:
        batches: The readings of each batch.

    Example:
        >>> one = TimeReading("rnn", "l0", "exact", timesteps=50, decay_rate=-0.10, steps=49)
        >>> other = TimeReading("rnn", "l0", "exact", timesteps=50, decay_rate=-0.12, steps=49)
        >>> (reading,) = combine_readings([[one], [other]])
        >>> f"{reading.decay_rate:.2f} ± {reading.decay_error:.3f}"
        '-0.11 ± 0.127'
    """
    grouped: dict[_Key, list[TimeReading]] = {}
    for readings in batches:
        for reading in readings:
            key = (reading.module, reading.part, reading.source)
            grouped.setdefault(key, []).append(reading)
    return tuple(_combine(group) for group in grouped.values())


def _combine(group: Sequence[TimeReading]) -> TimeReading:
    if len(group) == 1:
        return group[0]
    known = [reading for reading in group if math.isfinite(reading.decay_rate)]
    timesteps = max(reading.timesteps for reading in group)
    longest = [reading for reading in group if reading.timesteps == timesteps]
    rate, error = _rate(known)
    return replace(
        group[0],
        timesteps=timesteps,
        sequences=sum(reading.sequences for reading in group),
        decay_rate=rate,
        decay_error=error,
        steps=min((reading.steps for reading in known), default=0),
        recency=_mean([reading.recency for reading in group]),
        profile=_pooled([reading.profile for reading in longest], _root_mean_square),
        entry=_pooled([reading.entry for reading in longest], _mean),
        causes=_causes(group),
        note=_note(group, len(known)),
    )


def _rate(known: Sequence[TimeReading]) -> tuple[float, float]:
    if not known:
        return math.nan, math.nan
    if len(known) == 1:
        return known[0].decay_rate, known[0].decay_error
    rates = [reading.decay_rate for reading in known]
    rate, degrees = sum(rates) / len(rates), len(rates) - 1
    variance = sum((one - rate) ** 2 for one in rates) / degrees
    return rate, student_t(degrees) * math.sqrt(variance / len(rates))


def _note(group: Sequence[TimeReading], known: int) -> str:
    """Why the rate is not known, or in how many of the batches."""
    notes = [reading.note for reading in group if reading.note]
    if not notes or not known:
        return notes[0] if notes else ""
    return f"in {len(notes)} of {len(group)} batches: {notes[0]}"


def _causes(group: Sequence[TimeReading]) -> dict[str, float]:
    names = dict.fromkeys(name for reading in group for name in reading.causes)
    return {name: _mean([r.causes[name] for r in group if name in r.causes]) for name in names}


def _pooled(
    profiles: Sequence[Sequence[float]], pool: Callable[[Sequence[float]], float]
) -> tuple[float, ...]:
    known = [profile for profile in profiles if profile]
    return tuple(pool(values) for values in zip(*known, strict=True))


def _mean(values: Sequence[float]) -> float:
    """Of what is known."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _root_mean_square(values: Sequence[float]) -> float:
    # hypot, because squares of a vanished gradient are 0.
    return math.hypot(*values) / math.sqrt(len(values))
