"""``docs/memory.md``, written from the measurements so that it cannot go stale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.memory.correlation import RESAMPLES
from benchmarks.memory.models import HIDDEN, select
from benchmarks.memory.results import (
    correlation_table,
    horizon_table,
    row_table,
    task_names,
    task_table,
    value_in_words,
    verdict,
)
from benchmarks.memory.runner import CHECK_EVERY, MAX_NORM
from benchmarks.memory.spans import SEQUENCES
from benchmarks.memory.tasks import HELD_OUT, Workload, workload_named
from benchmarks.tables import counted, joined, markdown

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"

_HEAD = """\
# What recurrent modules learn to remember

`python -m benchmarks memory` trains the modules of `lightning_gradguard.nn` on the tasks of
`lightning_gradguard.tasks`, {seeds} each, and asks whether what the probe measures before training
says what will be learned.

{verdict}

![Progress against horizon, and models by tasks](../benchmarks/results/memory_cpu.png)

## How it was measured

One layer of {hidden} units (`DilatedRNN`: {hidden} in each of its layers) and a linear head; Adam,
gradients clipped to a norm of {max_norm:g}, no guard, batches of {batch} sequences that are drawn
anew, so that none is seen twice. Each model has its own grid of learning rates; the tables show the
rate that solves the task with most seeds, or else in the fewest steps, or else comes closest to it
on validation. Every {check} steps {held_out} sequences are validated on; a run ends when they are
solved, or with its budget. Models that skip go on to the end, because what they save is learned
after the task. The metric is that of {held_out} test sequences at the end, median over seeds.

*Horizon* is the number of timesteps in which the gradient changes by 10³, ln 10³ / |rate|, and
*half-life* ln 2 / |rate|, with the rate that `TimestepProbe` measures on {sequences} test sequences
under the task's own loss, before the first step and after the last one: of the layer with the
longest horizon, since the gradient can go through that one. *Progress* is 0 where nothing is
remembered, 1 at the target and beyond it, linear in the metric between them. ρ is Spearman's rank
correlation with horizon / length; its 95 % interval is from {resamples:,} bootstrap resamples of
pairs of model and task with all their seeds. *Within tasks* ranks are taken in each task by itself,
so that easy and hard tasks alone correlate nothing.

{rates}

Which models try a task was chosen to keep all runs within two hours, and each task has one length
(`adding_50` and `adding_200` differ in their variant too). Not tried are `SequentialDigits`,
`CharacterCorpus` and `SequentialMNIST`, and so none of the figures published for pixel by pixel
MNIST, which take a GPU; nor `BatchNormLSTM`, residual stacks, leaky ReLU, PReLU and
`TemporalAttention`.

This page is written by the command ({cpu}, torch {torch}, one thread a run, all runs together
{minutes} minutes of processor time), and a test compares it with
`benchmarks/results/memory_cpu.json`.
"""

_TASKS = {
    "adding_50": "The sum of two marked numbers of U(−.5, .5), one in the first tenth and one in "
    "the last half of 50 steps; solved below a hundredth of the variance of the sum, as by Campos "
    "et al. 2018, who need 53.9 ± 2.1 % of the updates with a Skip LSTM and 50.7 ± 2.6 % with a "
    "Skip GRU.",
    "adding_200": "The sum of two marked numbers of U(0, 1), anywhere in 200 steps. Bai et al. "
    "2018 report .177 of an RNN, .164 of an LSTM and 5.3e-5 of a GRU at 600 steps.",
    "copy_100": "Ten of eight symbols to be repeated after a delay of 100 steps; solved below a "
    "tenth of the cross entropy of whoever has forgotten them.",
    "order_100": "Which of two symbols came, and in which order, in the second and the sixth tenth "
    "of 100 steps.",
    "frequency_100": "Whether the period of a sine is 5 to 6 ms, from 100 steps of 1 ms. Campos et "
    "al. need 12.7 ± .5 updates with a Skip LSTM and 23.5 ± 6.2 with a Skip GRU.",
}


def write(result: Mapping[str, Any]) -> Path:
    """Write the page; returns where it is."""
    DOCUMENT.write_text(page(result), encoding="utf-8")
    return DOCUMENT


def page(result: Mapping[str, Any]) -> str:
    """The page for a result."""
    tasks = [_task(result, name) for name in task_names(result)]
    return "\n".join([_head(result), _aims(result), _prediction(result), *tasks])


def _head(result: Mapping[str, Any]) -> str:
    settings = result["settings"]
    batch = {workload_named(name).batch_size for name in task_names(result)}
    return _HEAD.format(
        seeds=counted(settings["seeds"], "seed"),
        verdict=verdict(result),
        hidden=HIDDEN,
        max_norm=MAX_NORM,
        batch=joined([str(size) for size in sorted(batch)]),
        check=CHECK_EVERY,
        held_out=HELD_OUT,
        sequences=SEQUENCES,
        resamples=RESAMPLES,
        rates=_rates(result),
        cpu=result["machine"]["cpu"],
        torch=result["machine"]["packages"]["torch"],
        minutes=round(settings["seconds_of_runs"] / 60),
    )


def _rates(result: Mapping[str, Any]) -> str:
    """The grids of learning rates, and how models are set up."""
    models: dict[str, list[str]] = {}
    for row in result["rows"]:
        own = models.setdefault(joined([f"{rate:g}" for rate in row["rates"]]), [])
        own += [row["model"]] * (row["model"] not in own)
    tried = {name for names in models.values() for name in names}
    notes = [f"{m.name}: {m.note}" for m in select(()) if m.note and m.name in tried]
    rates = "; ".join(f"{grid} for {joined(names)}" for grid, names in models.items())
    return f"Rates: {rates}.\n\n" + "\n".join(f"- {note}." for note in notes)


def _aims(result: Mapping[str, Any]) -> str:
    rows: list[list[str]] = [["aim", "", "by", "not by"]]
    for entry in result["aims"]:
        names = [", ".join(entry[key]) for key in ("by", "not_by")]
        rows.append([entry["aim"], "met" if entry["met"] else "not met", *names])
    met = sum(entry["met"] for entry in result["aims"])
    aims = counted(len(result["aims"]), "aim")
    return (
        f"## What was to be reached\n\n{met} of {aims} met; *solves* means with every seed.\n\n"
        f"{markdown(rows)}\n"
    )


def _prediction(result: Mapping[str, Any]) -> str:
    unmeasured = max(entry["unmeasured"] for entry in result["correlations"])
    left_out = f" {counted(unmeasured, 'run')} had no rate and are left out." if unmeasured else ""
    return (
        "## Does the probe predict what the model can learn?\n\n"
        f"{markdown(correlation_table(result))}\n\n"
        "After training the horizon is partly an effect of what was learned, so that only the rows "
        f"*before* are a prediction.{left_out}\n\n"
        f"Runs at the best rates by their horizon:\n\n{markdown(horizon_table(result))}\n\n"
        "ρ with the progress, task by task; a dash where all models have the same progress:\n\n"
        f"{markdown(task_table(result))}\n"
    )


def _task(result: Mapping[str, Any], name: str) -> str:
    workload = workload_named(name)
    return (
        f"## {name}\n\n{_TASKS.get(name, '')} {_conditions(workload)}\n\n"
        f"{markdown(row_table(result, name))}\n"
    )


def _conditions(workload: Workload) -> str:
    nothing, target = (
        value_in_words(workload.metric, value) for value in (workload.nothing, workload.target)
    )
    relation = "from" if workload.metric == "accuracy" else "below"
    skips = f", an update costs {workload.update_cost:g}" if _has_skips(workload) else ""
    return (
        f"T = {workload.timesteps}, {workload.metric} {nothing} without memory, solved {relation} "
        f"{target}, budget {workload.steps:,} steps{skips}."
    )


def _has_skips(workload: Workload) -> bool:
    return any(name.startswith("Skip") for name in workload.models)
