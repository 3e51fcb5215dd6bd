"""What differs between two runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.record.finding_groups import name_of
from lightning_gradguard.record.html_report.words import (
    median,
    number,
    percent,
    steps_taken,
    worst,
)
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory

# What the loss came to is its median over the last twentieth of the run, which noise hardly moves.
_END = 20
_SHARES = {
    "Clipped steps": "clipped_steps",
    "Dropped steps": "skipped_steps",
    "Capped steps": "capped_steps",
}


@dataclass(frozen=True)
class Difference:
    """A value in both runs, in words.

    Attributes:
        name: What it is.
        here: In the run of the report.
        there: In the other run.
        optimizer: Whose it is, where there are several.
    """

    name: str
    here: str
    there: str
    optimizer: str = ""


@dataclass(frozen=True)
class Comparison:
    """What changed since another run.

    Attributes:
        name: Of the other run.
        settings: Those that differ.
        numbers: Of each optimizer that both runs have.
        new: Names of findings of this run alone, each with its highest severity.
        gone: Of the other run alone.
        kept: Of both.
    """

    name: str
    settings: list[Difference] = field(default_factory=list)
    numbers: list[Difference] = field(default_factory=list)
    new: dict[str, str] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def compare_runs(run: RunHistory, other: RunHistory) -> Comparison:
    """What changed from ``other`` to ``run``."""
    here, there = _by_name(run.findings), _by_name(other.findings)
    return Comparison(
        name=other.info.name or "the other run",
        settings=list(_different_facts(run, other)),
        numbers=[
            difference
            for part in run.optimizers
            if (twin := twin_of(part, run, other)) is not None
            for difference in _number_pairs(part, twin)
        ],
        new={name: level for name, level in here.items() if name not in there},
        gone={name: level for name, level in there.items() if name not in here},
        kept={name: level for name, level in here.items() if name in there},
    )


def twin_of(
    part: OptimizerHistory, run: RunHistory, other: RunHistory | None
) -> OptimizerHistory | None:
    """The same optimizer in another run: of the same label, or the only one in both."""
    if other is None:
        return None
    if len(run.optimizers) == len(other.optimizers) == 1:
        return other.optimizers[0]
    return next((twin for twin in other.optimizers if twin.label == part.label), None)


def numbers_of(part: OptimizerHistory) -> dict[str, str]:
    """The figures by which runs are compared, in words; a dash for what is not known."""
    losses = part.steps["loss"]
    finite = losses[np.isfinite(losses)]
    end = finite[-max(1, len(finite) // _END) :]
    steps = steps_taken(part)
    values = {
        "Steps": f"{steps:,}",
        "Loss at the end": number(median(end)),
        "Lowest loss": number(float(finite.min()) if finite.size else math.nan),
        "Median norm": number(median(part.steps["total_norm"])),
    }
    for name, count in _SHARES.items():
        values[name] = percent(part.counts.get(count, 0) / steps if steps else math.nan)
    return values


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level, each value in words.

    Example:
        >>> flat_settings({"mode": "protect", "clip": {"max_norm": 1.0}})
        {'mode': 'protect', 'clip.max_norm': '1.0'}
    """
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def optimizer_words(facts: Mapping[str, Any]) -> str:
    """Class and learning rate of an optimizer.

    Example:
        >>> optimizer_words({"class": "AdamW", "lr": 1e-3})
        'AdamW, lr 0.001'
    """
    words = str(facts.get("class", "") or "unknown")
    rate = facts.get("lr")
    return f"{words}, lr {rate:.4g}" if isinstance(rate, (int, float)) else words


def _by_name(findings: list[Finding]) -> dict[str, str]:
    """The highest severity of each kind of finding at each place."""
    named: dict[str, list[Finding]] = {}
    for finding in findings:
        named.setdefault(name_of(finding), []).append(finding)
    return {name: worst(members) for name, members in named.items()}


def _different_facts(run: RunHistory, other: RunHistory) -> Iterator[Difference]:
    here, there = _facts(run), _facts(other)
    for name in [*here, *(name for name in there if name not in here)]:
        a, b = here.get(name, "–"), there.get(name, "–")
        if a != b:
            yield Difference(name, a, b)


def _facts(run: RunHistory) -> dict[str, str]:
    info = run.info
    facts = {"model": info.model, "parameters": f"{info.parameters:,}", "status": info.status}
    for optimizer in info.optimizers:
        label = optimizer.get("label")
        facts[f"optimizer {label}" if label else "optimizer"] = optimizer_words(optimizer)
    facts |= flat_settings(info.settings)
    return facts | {f"{name} version": version for name, version in info.versions.items()}


def _number_pairs(part: OptimizerHistory, other: OptimizerHistory) -> Iterator[Difference]:
    there = numbers_of(other)
    for name, value in numbers_of(part).items():
        yield Difference(name, value, there[name], part.label)
    halves, other_halves = _half_lives(part), _half_lives(other)
    for name in [*halves, *(name for name in other_halves if name not in halves)]:
        a, b = halves.get(name, "–"), other_halves.get(name, "–")
        yield Difference(f"Half-life in {name}", a, b, part.label)


def _half_lives(part: OptimizerHistory) -> dict[str, str]:
    """In steps; of a gradient that grows, how fast it doubles."""
    return {
        reading.name: ("doubles in " if reading.decay_rate > 0.0 else "")
        + number(round(reading.half_life, 1))
        for reading in part.latest_times
        if not math.isnan(reading.decay_rate)
    }
