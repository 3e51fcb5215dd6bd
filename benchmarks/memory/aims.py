"""What was to be reached, and whether it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

GATED = (
    "LSTM",
    "LSTM forget bias 1",
    "LSTM chrono",
    "GRU",
    "LayerNormLSTM",
    "LayerNormGRU",
    "SkipLSTM",
    "SkipGRU",
)
SKIPPING = ("SkipLSTM", "SkipGRU")
MOST_UPDATES = 0.6
# How far a mean squared error may be from that of the mean to count as nothing learned.
_ABOUT = 0.1


@dataclass(frozen=True)
class Aim:
    """Something that the rows of a task and some models have to show.

    Attributes:
        text: In words.
        task: Name of the task.
        models: Names of the models; all of them for none.
        met: Whether a row shows it.
        any_of: Whether one row is enough.
    """

    text: str
    task: str
    models: Sequence[str]
    met: Callable[[Row], bool]
    any_of: bool = False


def _solved(row: Row) -> bool:
    """By all seeds."""
    return bool(row["solved"] == row["seeds"])


def _saving(row: Row) -> bool:
    """By each seed."""
    return row["most_updates"] is not None and row["most_updates"] <= MOST_UPDATES


def _at_the_mean(row: Row) -> bool:
    return row["value"] is not None and abs(row["value"] * 6.0 - 1.0) <= _ABOUT


AIMS = (
    Aim("every gated model solves adding_50", "adding_50", GATED, _solved),
    Aim(
        f"models that skip solve adding_50 with at most {MOST_UPDATES:.0%} of the updates",
        "adding_50",
        SKIPPING,
        lambda row: _solved(row) and _saving(row),
    ),
    Aim(
        "a tanh RNN stays at .167, the error of the mean, on adding_200",
        "adding_200",
        ("tanh RNN",),
        _at_the_mean,
    ),
    Aim(
        "a GRU and an LSTM with chrono initialization solve adding_200",
        "adding_200",
        ("GRU", "LSTM chrono"),
        _solved,
    ),
    Aim(
        "a dilated RNN is below a tenth of the baseline on copy_100",
        "copy_100",
        ("DilatedRNN",),
        _solved,
    ),
    Aim("some model solves order_100", "order_100", (), _solved, any_of=True),
)


def aims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each aim with the models that show it and those that do not; without rows it is left out."""
    found = []
    for aim in AIMS:
        own = [row for row in rows if row["task"] == aim.task]
        own = [row for row in own if not aim.models or row["model"] in aim.models]
        if not own:
            continue
        by = {shows: [r["model"] for r in own if aim.met(r) == shows] for shows in (True, False)}
        met = bool(by[True]) if aim.any_of else not by[False]
        found.append({"aim": aim.text, "met": met, "by": by[True], "not_by": by[False]})
    return found
