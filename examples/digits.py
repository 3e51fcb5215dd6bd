"""Train a recurrent net on handwritten digits, pixel by pixel, with and without the guard.

scikit-learn's 8x8 digits come in as sequences of 64 pixels, so that every gradient has to travel
back through 64 steps. The same model, data order and initial weights are trained at a row of
learning rates without and with ``callbacks=[GradGuard()]``. A rule that looks only at the runs
*without* the guard then picks the learning rate at which both are shown in detail.

    python examples/digits.py            # the whole story
    python examples/digits.py --quick    # fewer rates and steps
    python examples/digits.py --help

It needs scikit-learn, matplotlib and rich beside this package, and no network.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import logging
import multiprocessing
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from arguments import at_least, chosen_steps
from digits_figures import save_figure
from digits_task import PixelSequences, SequenceClassifier
from digits_words import console, print_checks, print_runs, print_story, print_sweep
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from typing_extensions import override

from lightning_gradguard import Finding, GradGuard, GradientMonitor
from lightning_gradguard.record import StepRecord
from lightning_gradguard.respond import Action

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
QUICK_RATES = (0.1, 1.0, 10.0)
HEADLINE_RATE = 3.0  # what the rule picks from RATES; --no-sweep has nothing to pick from
STEPS = 1500
QUICK_STEPS = 300
CHANCE = 0.2  # ten classes: guessing gives 0.1, and a net that still learns is well above 0.2


# -- one run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What is kept of one run; the lists are empty where nothing watched it."""

    rate: float
    guarded: bool
    accuracy: float
    finite: bool
    seconds: float
    fingerprint: str
    history: list[StepRecord] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it ended at chance or with weights that are not numbers."""
        return not self.finite or self.accuracy < CHANCE


def train(
    rate: float,
    steps: int,
    seed: int,
    watcher: GradGuard | GradientMonitor | None,
    folder: Path,
    *,
    in_detail: bool = False,
) -> Run:
    """Train and test once.

    Args:
        rate: Learning rate.
        steps: Optimizer steps.
        seed: Decides the initial weights and the order of the data.
        watcher: The one callback that is added, if any.
        folder: Where the run writes what it writes.
        in_detail: Whether to show a progress bar and to write metrics.
    """
    torch.set_num_threads(1)  # a small recurrent net is slower on several threads
    seed_everything(seed, verbose=False)
    model, data = SequenceClassifier(rate), PixelSequences(steps, seed)
    callbacks: list[Callback] = [] if watcher is None else [watcher]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[*callbacks, ProgressBar()] if in_detail else callbacks,
        logger=CSVLogger(folder.parent, folder.name, version="") if in_detail else False,
        log_every_n_steps=10,
        enable_progress_bar=in_detail,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    with flushed_denormals():
        trainer.fit(model, data)
    seconds = time.perf_counter() - start
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.disable()  # the test is a single batch
    [results] = trainer.test(model, data, verbose=False)
    if watcher is not None and watcher.broken:
        raise RuntimeError("the callback turned itself off; its message is above")
    return Run(
        rate=rate,
        guarded=isinstance(watcher, GradGuard),
        accuracy=results["test_accuracy"],
        finite=all(bool(p.isfinite().all()) for p in model.parameters()),
        seconds=seconds,
        fingerprint=fingerprint(model),
        **({} if watcher is None else what_happened(watcher)),
    )


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """A saturated net has gradients near 1e-40, for which a processor may take 15 times as long."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # it is the processor's, and not only this run's


def what_happened(watcher: GradGuard | GradientMonitor) -> dict[str, Any]:
    return {
        "history": watcher.history,
        "findings": watcher.findings,
        "actions": watcher.actions,
        "counts": watcher.counts,
    }


def fingerprint(model: nn.Module) -> str:
    """Two runs with the same fingerprint ended with the same weights, bit for bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


class ProgressBar(RichProgressBar):
    """Lightning's own, for a run of one long epoch and a logger that counts no versions."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No lines about the hardware and no tips; warnings stay, but for three that do not apply.

    What the guard says while it works is shown by this program at the end; an error inside the
    guard itself would be shown at once.
    """
    trainer, guard = (
        logging.getLogger("lightning.pytorch"),
        logging.getLogger("lightning_gradguard"),
    )
    level = trainer.level
    trainer.setLevel(logging.WARNING)
    guard.addFilter(is_internal_error)
    with warnings.catch_warnings():
        for message in (
            "The '.*_dataloader' does not have many workers",  # the data are in memory already
            "GPU available but not used",  # a GPU is slower at 64 small steps, one after another
            ".isinstance\\(treespec, LeafSpec\\). is deprecated",  # between Lightning and torch
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            trainer.setLevel(level)
            guard.removeFilter(is_internal_error)


def is_internal_error(record: logging.LogRecord) -> bool:
    return record.exc_info is not None


# -- the sweep -------------------------------------------------------------------------------------


def sweep(rates: Sequence[float], steps: int, seed: int, output: Path) -> list[Run]:
    """Train at every rate without and with the guard, two runs side by side."""
    shutil.rmtree(output / "sweep", ignore_errors=True)  # of an earlier demonstration
    jobs = [
        (rate, steps, seed, guarded, output / "sweep")
        for rate in rates
        for guarded in (False, True)
    ]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    spawn = multiprocessing.get_context("spawn")
    with progress, ProcessPoolExecutor(max_workers=2, mp_context=spawn) as pool:
        task = progress.add_task(f"{len(jobs)} runs, two at a time", total=len(jobs))
        waiting = [pool.submit(sweep_job, *job) for job in jobs]
        for _ in as_completed(waiting):
            progress.advance(task)
    return [done.result() for done in waiting]


def sweep_job(rate: float, steps: int, seed: int, guarded: bool, folder: Path) -> Run:
    with quiet():
        return train(rate, steps, seed, GradGuard() if guarded else None, folder / f"{rate:g}")


def choose_rate(runs: Sequence[Run]) -> tuple[float, str]:
    """The rate at which both runs are shown, and why; the guarded runs have no say in it."""
    unguarded = [run for run in runs if not run.guarded]
    failed = [run.rate for run in unguarded if run.failed]
    if failed:
        return min(failed), (
            "the smallest one at which the run without the guard ends at chance "
            f"(below {CHANCE}) or in NaN"
        )
    return max(run.rate for run in unguarded), (
        "the largest one, because no run without the guard ended at chance or in NaN"
    )


# -- the story -------------------------------------------------------------------------------------


def headline(rate: float, steps: int, seed: int, output: Path) -> list[Run]:
    """The same run twice, one after the other: without and with the guard."""
    runs = []
    # The monitor never changes a bit of training: it is there so that its curves can be drawn.
    for name, watcher in (("without_guard", GradientMonitor()), ("with_guard", GradGuard())):
        console.rule(f"{name.replace('_', ' ')}, learning rate {rate:g}", align="left")
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier demonstration
        with quiet():
            runs.append(train(rate, steps, seed, watcher, folder, in_detail=True))
    return runs


def write_sweep(runs: Sequence[Run], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["learning_rate", "guarded", "test_accuracy", "finite", "seconds"])
        for run in runs:
            writer.writerow(
                [run.rate, run.guarded, run.accuracy, run.finite, round(run.seconds, 2)]
            )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an LSTM on handwritten digits with and without the guard."
    )
    parser.add_argument("--steps", type=at_least(1), help=f"steps of every run ({STEPS})")
    parser.add_argument("--rates", type=positive_float, nargs="+", help=f"rates to sweep {RATES}")
    parser.add_argument("--seed", type=int, default=0, help="weights and data order (0)")
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="runs/digits")
    parser.add_argument(
        "--no-sweep", action="store_true", help=f"only the two runs, at {HEADLINE_RATE}"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} steps at the rates {QUICK_RATES}"
    )
    options = parser.parse_args(arguments)
    options.steps = chosen_steps(options, STEPS, QUICK_STEPS)
    options.rates = sorted(set(options.rates or (QUICK_RATES if options.quick else RATES)))
    return options


def positive_float(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    swept: list[Run] = []
    rate = HEADLINE_RATE
    if not options.no_sweep:
        swept = sweep(options.rates, options.steps, options.seed, options.output)
        write_sweep(swept, options.output / "sweep.csv")
        rate, why = choose_rate(swept)
        console.print(f"Learning rate {rate:g} is {why}. At this rate, once more and in detail:\n")
    runs = headline(rate, options.steps, options.seed, options.output)
    picture = options.output / "digits.png"
    save_figure(runs, swept, picture)
    console.print()
    if swept:
        print_sweep(swept, rate)
    print_runs(runs)
    print_checks(runs, swept)
    print_story(runs)
    console.rule(align="left")
    console.print(f"Picture, metrics, events and the table of the sweep are in {options.output}/")
    console.print(f"{time.perf_counter() - started:.0f} seconds in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
