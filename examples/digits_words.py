"""The words of the demonstration: tables and findings, for people at a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_gradguard.diagnose import by_cause
from lightning_gradguard.record import action_lines

if TYPE_CHECKING:
    from digits import Run

TARGET = 0.85
MAX_LINES = 12

console = Console(highlight=False)


def print_sweep(swept: Sequence[Run], chosen: float) -> None:
    """Accuracy by learning rate, without and with the guard."""
    table = Table(title="Test accuracy by learning rate", title_justify="left")
    for column in ("learning rate", "without", "with the guard"):
        table.add_column(column, justify="right")
    table.add_column("")
    without, guarded = split(swept)
    for bare, held in zip(without, guarded, strict=True):
        mark = "<- shown below" if bare.rate == chosen else ""
        table.add_row(f"{bare.rate:g}", accuracy_of(bare), accuracy_of(held), mark)
    console.print(table)
    for label, runs in (("without", without), ("with", guarded)):
        good = [f"{run.rate:g}" for run in runs if run.finite and run.accuracy >= TARGET]
        best = max(runs, key=lambda run: run.accuracy)
        at = f": {', '.join(good)}" if good else ""
        console.print(
            f"  {label:7} the guard: {TARGET} or more at {len(good)} of {len(runs)} rates{at}; "
            f"best {best.accuracy:.3f} at {best.rate:g}"
        )
    console.print()


def accuracy_of(run: Run) -> str:
    if not run.finite:
        return f"[red]NaN {run.accuracy:.3f}[/red]"
    if run.failed:
        return f"[red]chance {run.accuracy:.3f}[/red]"
    return f"[bold]{run.accuracy:.3f}[/bold]" if run.accuracy >= TARGET else f"{run.accuracy:.3f}"


def split(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    return [run for run in runs if not run.guarded], [run for run in runs if run.guarded]


def print_runs(runs: Sequence[Run]) -> None:
    """The two runs side by side."""
    table = Table(title=f"The two runs at learning rate {runs[0].rate:g}", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column("with the guard" if run.guarded else "without", justify="right")
    for label, value in (
        ("test accuracy", accuracy_of),
        ("loss at the first step", lambda run: number(run.history[0].loss)),
        ("loss, median of the last 25 steps", lambda run: number(last_loss(run))),
        ("largest gradient norm", lambda run: number(max(r.total_norm for r in run.history))),
        ("steps with a clipped gradient", lambda run: count(run, "clipped_steps")),
        ("steps with a capped update", lambda run: count(run, "capped_steps")),
        ("steps skipped", lambda run: count(run, "skipped_steps")),
        ("findings", lambda run: str(len(run.findings))),
        ("seconds of training", lambda run: f"{run.seconds:.1f}"),
    ):
        table.add_row(label, *(value(run) for run in runs))
    console.print(table)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def last_loss(run: Run) -> float:
    return median(row.loss for row in run.history[-25:] if row.loss is not None)


def count(run: Run, key: str) -> str:
    return str(run.counts[key]) if run.guarded else "-"


def print_checks(runs: Sequence[Run], swept: Sequence[Run]) -> None:
    """What makes the comparison fair, as far as it can be seen in the runs themselves."""
    without, guarded = runs
    same_start = without.history[0].loss == guarded.history[0].loss
    console.print(
        "Both runs start from the same weights and batches: their first losses are "
        + ("equal to the last bit." if same_start else "NOT equal. Something is wrong here.")
    )
    bare = [run for run in swept if not run.guarded and run.rate == without.rate]
    if bare:
        same_end = bare[0].fingerprint == without.fingerprint
        console.print(
            "The run without the guard carries GradientMonitor(), so that its curves can be drawn. "
            "Its final weights are "
            + ("equal to the last bit to" if same_end else "NOT equal to")
            + " those of the run in the sweep, which had no callback at all."
        )
    console.print()


def print_story(runs: Sequence[Run]) -> None:
    """What was found in each run, and what the guard did and when."""
    for run in runs:
        title = "with the guard" if run.guarded else "without the guard"
        console.rule(f"What was found {title}", align="left")
        print_findings(run)
        if run.guarded:
            console.rule("What the guard did", align="left")
            print_actions(run)


def print_findings(run: Run) -> None:
    if not run.findings:
        console.print("Nothing.")
    advised: set[str] = set()
    for finding in by_cause(run.findings)[:MAX_LINES]:
        follows = f", follows from {finding.follows_from}" if finding.follows_from else ""
        console.print(
            f"step {finding.step}, {finding.severity.label}{follows}: {escape(finding.message)}"
        )
        if finding.pathology.value not in advised:  # the same advice once is enough
            advised.add(finding.pathology.value)
            for remedy in finding.remedies:
                console.print(f"    -> {remedy.sentence} [dim]{escape(remedy.code)}[/dim]")
    if len(run.findings) > MAX_LINES:
        console.print(f"... and {len(run.findings) - MAX_LINES} more in events.jsonl")


def print_actions(run: Run) -> None:
    for what, steps in (
        ("clipped the gradient", [r.step for r in run.history if 0.0 < r.clip_coef < 1.0]),
        ("capped the update", [r.step for r in run.history if r.capped_tensors > 0]),
    ):
        if steps:
            console.print(f"{what} in {len(steps)} steps, between {steps[0]} and {steps[-1]}")
    for line in action_lines(run.actions):
        console.print(escape(line))
    if not run.actions and not run.counts["clipped_steps"] + run.counts["capped_steps"]:
        console.print("Nothing: the run did not need it.")
