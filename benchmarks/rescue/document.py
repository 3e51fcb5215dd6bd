"""``docs/rescue.md``, written from the measurements so that it cannot go stale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.rescue.contenders import GUARD
from benchmarks.rescue.results import (
    fault_table,
    harm_sentence,
    range_table,
    score_table,
)
from benchmarks.rescue.scoring import LEAST_LEARNED, NOISE, TARGET_SHARE
from benchmarks.rescue.workloads import WORKLOADS
from benchmarks.tables import counted, joined, markdown, shown

DOCUMENT = Path(__file__).parents[2] / "docs" / "rescue.md"

_HEAD = """\
# What the guard saves, and what it costs healthy runs

`python -m benchmarks rescue` trains small nets at nine learning rates over four decades, from
ordinary to far too large, with {seeds}, under SGD (momentum 0.9) and AdamW as torch sets them
up: without a guard, with `GradGuard()` as it comes (its engine, in a plain loop), and with eight
rules of others. ZClip is its authors' package; the rest is written anew from the papers. All
contenders see the same weights and batches.

*Score* is the test accuracy; of `adding` the share of variance that is explained, of `characters`
(the next character of a file of Python's standard library) the share of the entropy of single
characters. *Target* is {share:.0%} of the way from knowing nothing to the best mean score that
anything but the guard has at any rate; where that best is less than {least} above knowing nothing
there is no target, and the row is left out of the counts. *Range* is 0.5 decades for each rate
that reaches the target, mean over seeds. Constants of the guard were tuned on runs of seeds 0 to 2
of {tuned} ([default-response.md](default-response.md)); {held_out} and the later seeds here were
not used for it. Nothing was tuned for any other contender.

Numbers that vanish are flushed to zero, for all alike: they cost some processors fifteen times the
time. This page is written by the command ({cpu}, torch {torch}, one thread a run), and a test
compares it with `benchmarks/results/rescue_cpu.json`.

![Score against learning rate for every workload](../benchmarks/results/rescue_cpu.png)
"""

_FAULTS = """\
## Faults on top of healthy runs

At an ordinary learning rate something goes wrong once, 40 % to 60 % into the run: one input is NaN;
one label is infinite; a batch is 10,000 times too large; the highest exponent bit of one weight
flips; the learning rate is 1,000 times too large for 10 steps. Share of the runs that still reach
the target, of those whose twin without a fault reaches it:
"""


def write(result: Mapping[str, Any]) -> Path:
    """Write the page; returns where it is."""
    DOCUMENT.write_text(page(result), encoding="utf-8")
    return DOCUMENT


def page(result: Mapping[str, Any]) -> str:
    """The page for a result."""
    parts = [_head(result), _ranges(result), _rescue(result), _faults(result), _harm(result)]
    return "\n".join([*parts, _scores(result)])


def _head(result: Mapping[str, Any]) -> str:
    names = {True: [], False: []}  # type: dict[bool, list[str]]
    for workload in WORKLOADS:
        names[workload.development].append(f"`{workload.name}`")
    return _HEAD.format(
        seeds=counted(result["settings"]["seeds"], "seed"),
        share=TARGET_SHARE,
        least=LEAST_LEARNED,
        tuned=joined(names[True]),
        held_out=joined(names[False]),
        cpu=result["machine"]["cpu"],
        torch=result["machine"]["packages"]["torch"],
    )


def _ranges(result: Mapping[str, Any]) -> str:
    entries = [entry for entry in result["workloads"] if entry["ahead"] is not None]
    wider = sum(entry["ahead"] >= 0.5 for entry in entries)
    narrower = [entry for entry in entries if entry["ahead"] < 0.0]
    without = [
        f"`{entry['workload']}` under {entry['optimizer']}"
        for entry in result["workloads"]
        if entry["target"] is None
    ]
    text = (
        "## Stable range of learning rates\n\nDecades over which the target is reached; the grids "
        f"span 4, so that 4.5 means all nine rates.\n\n{markdown(range_table(result))}\n\n"
        f"Of {len(entries)} rows the guard is wider than the best of all others by half a decade "
        f"or more in {wider}, and narrower in {len(narrower)}"
    )
    text += f" ({', '.join(e['workload'] + ' ' + e['optimizer'] for e in narrower)})." * bool(
        narrower
    )
    text += "." * (not narrower)
    if without:
        text += f" Nothing but perhaps the guard learns {joined(without)} within the budget."
    return text + "\n"


def _rescue(result: Mapping[str, Any]) -> str:
    rescue = result["rescue"]
    rows = [["", "rescued"]]
    rows += [[name, shown(rate)] for name, rate in rescue["rates"].items() if rate is not None]
    return (
        "## Rescue rate\n\n"
        f"Of the {rescue['failing']} runs that miss the target without a guard, at rates too "
        f"large and too small, so many reach it:\n\n{markdown(rows)}\n"
    )


def _faults(result: Mapping[str, Any]) -> str:
    faults = result["faults"]
    text = f"{_FAULTS}\n{markdown(fault_table(result))}\n\n"
    runs = faults["runs"].get(GUARD, 0)
    text += (
        f"{runs} runs with the guard; they take {shown(faults['time_ratio'])} times as long as the "
        "same without fault and guard (median, processor time of a bare loop of these tiny nets).\n"
    )
    if faults["lost"]:
        text += "Lost with the guard: " + "; ".join(faults["lost"]) + ".\n"
    return text


def _harm(result: Mapping[str, Any]) -> str:
    harm = result["harm"]
    text = (
        "## Harm\n\nRuns of the grids that reach the target without a guard, paired with the same "
        f"runs with it. {harm_sentence(harm)} The interval takes each workload and rate as one "
        f"value; beyond the noise means by {NOISE:g} standard deviations of the difference of two "
        "seeds.\n"
    )
    if harm["worse"]:
        text += "\nWorse: " + "; ".join(harm["worse"]) + ".\n"
    return text


def _scores(result: Mapping[str, Any]) -> str:
    parts = ["## All scores\n"]
    for entry in result["workloads"]:
        title = f"### {entry['workload']}, {entry['optimizer']}"
        parts.append(f"{title}\n\n{markdown(score_table(entry))}\n")
    return "\n".join(parts)
