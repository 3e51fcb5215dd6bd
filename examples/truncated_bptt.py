"""Train on a text without an end in chunks: truncated backpropagation through time, watched.

The source of some modules of Python's standard library is read by 32 streams at once, character by
character. A batch holds the next 300 characters of each and is cut into chunks; the optimizer takes
a step after each chunk, the state of the GRU is carried over to the next one, and `detach_state`
cuts its graph there, so that memory does not grow with the text. Lightning 2 has no switch for
this: the model does it itself, in ``training_step``, with manual optimization.

``callbacks=[GradGuard()]`` watches. The gradient cannot reach back beyond the edge of a chunk, and
the guard does not take that for a gradient that vanishes: it reads how the gradient changes from
timestep to timestep within a chunk.

    python examples/truncated_bptt.py            # 200 steps for each length, under a minute
    python examples/truncated_bptt.py --quick    # 40 steps for each length
    python examples/truncated_bptt.py --help

It needs no more than this package and matplotlib, and no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from arguments import add_training, at_least, chosen_steps
from lightning.pytorch import LightningModule, Trainer, seed_everything
from run_quietly import quiet
from torch import Tensor, nn
from truncated_bptt_figure import save_figure
from typing_extensions import override

from lightning_gradguard import GradGuard
from lightning_gradguard.diagnose import Finding, Pathology
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.time_table import format_time_table
from lightning_gradguard.tasks import CharacterCorpus, bptt_chunks, detach_state

CHUNKS = (10, 30, 100)
WINDOW = 300  # characters of each stream in a batch; cut into chunks
STREAMS = 32
HIDDEN = 64
STEPS = 200
QUICK_STEPS = 40
LEARNING_RATE = 5e-3


class Reader(LightningModule):
    """A GRU that says what the next character will be, and never stops reading.

    Attributes:
        losses: Of each chunk, in nats per character.
    """

    def __init__(self, task: CharacterCorpus, chunk: int) -> None:
        super().__init__()
        self.automatic_optimization = False  # several optimizer steps in one training_step
        self.task, self.chunk = task, chunk
        self.rnn = nn.GRU(task.input_size, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, task.output_size)
        self.state: Tensor | None = None
        self.losses: list[Tensor] = []

    @override
    def on_train_epoch_start(self) -> None:
        self.state = None  # every stream begins anew

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for inputs, targets in bptt_chunks(batch, self.chunk):
            outputs, self.state = self.rnn(inputs, detach_state(self.state))
            loss = self.task.loss(self.head(outputs), targets)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.detach())
            if len(self.losses) == self.trainer.max_steps:
                return  # in the middle of a batch

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), LEARNING_RATE)


@dataclass(frozen=True)
class Run:
    """What is kept of the training with one length of chunks.

    Attributes:
        chunk: Its length.
        losses: Of each step, in nats per character.
        readings: How the gradient traveled through time, each exact, oldest first.
        findings: What the guard found.
    """

    chunk: int
    losses: list[float]
    readings: list[TimeReading]
    findings: list[Finding]

    @property
    def vanishing(self) -> list[Finding]:
        """Where it was said that the gradient vanishes through time."""
        return [f for f in self.findings if f.pathology is Pathology.VANISHING_IN_TIME]


def train(chunk: int, steps: int, seed: int) -> Run:
    """Train for so many optimizer steps."""
    seed_everything(seed, verbose=False)
    batches = -(-steps * chunk // WINDOW)
    task = CharacterCorpus(length=WINDOW, stateful=True, batch_size=STREAMS)
    model = Reader(task, chunk)
    guard = GradGuard(events=False, incidents=False, exact_every_n_steps=max(2, steps // 20))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_train_batches=batches,
        limit_val_batches=0,
        callbacks=[guard],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, task)
    if guard.broken:
        raise RuntimeError("the callback turned itself off; its message is above")
    readings = [reading for reading in guard.time_readings if reading.source == "exact"]
    return Run(chunk, torch.stack(model.losses).tolist(), readings, guard.findings)


def print_findings(runs: Sequence[Run], baseline: float) -> None:
    """Where the gradient ends, and what is said of it."""
    print("\nAt the last measurement; T is the length of a chunk")
    print(format_time_table([run.readings[-1] for run in runs]))
    print(f"\nWho knows only how often each character comes pays {baseline:.2f} nats for each.")
    for run in runs:
        tenth = run.losses[-max(1, len(run.losses) // 10) :]
        print(
            f"chunks of {run.chunk}: {len(run.losses)} steps, {sum(tenth) / len(tenth):.2f} nats "
            f"over the last tenth; no gradient goes back more than "
            f"{run.readings[-1].timesteps - 1} steps; {said_of(run)}"
        )


def said_of(run: Run) -> str:
    """What the guard says of gradients that vanish through time."""
    if not run.vanishing:
        return "the guard does not take that for vanishing"
    first = run.vanishing[0]
    healed = [f.until for f in run.vanishing if f.until is not None]
    until = f" to {healed[-1]}" if healed else ""
    return (
        f"{first.severity.name.lower()} from step {first.since}{until}: within a chunk it reached "
        f"{first.evidence['horizon']:.0f} of {first.evidence['timesteps']:.0f} steps"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Watch truncated backpropagation through time.")
    add_training(parser, STEPS, QUICK_STEPS, "truncated_bptt.png", least=2)
    parser.add_argument(
        "--chunks", type=at_least(2), nargs="+", default=list(CHUNKS), help="lengths of chunks"
    )
    options = parser.parse_args(arguments)
    options.steps = chosen_steps(options, STEPS, QUICK_STEPS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a small recurrent net is slower on several threads
    with quiet():
        runs = [train(chunk, options.steps, options.seed) for chunk in options.chunks]
        baseline = CharacterCorpus(length=WINDOW).baseline
    print_findings(runs, baseline)
    save_figure(runs, baseline, options.output)
    print(f"\nThe picture is in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
