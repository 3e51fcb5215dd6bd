"""Swap a tanh RNN, whose gradient vanishes through time, for one remedy after the other.

The task: two of 50 symbols matter, one at about the 7th and one at about the 27th step, and their
order has to be named after the last one. An ordinary LightningModule with ``nn.RNN`` is trained
with ``callbacks=[GradGuard()]``: it learns nothing, and the guard's report names the cause and
remedies. Then the same model is trained with its recurrent module swapped, one line each, and
everything else as it was.

    python examples/recurrent_remedies.py            # 800 steps each, some two minutes
    python examples/recurrent_remedies.py --quick    # 100 steps each
    python examples/recurrent_remedies.py --help

It needs no more than this package and matplotlib, and no network.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import torch
from arguments import add_training, at_least, chosen_steps
from lightning.pytorch import Trainer, seed_everything
from recurrent_remedies_figure import save_figure
from recurrent_remedies_nets import SWAPS, Net, OrderNamer
from run_quietly import quiet

from lightning_gradguard import GradGuard
from lightning_gradguard.diagnose import Pathology
from lightning_gradguard.tasks import TemporalOrder

LENGTH = 50
BATCH_SIZE = 32
STEPS = 800
QUICK_STEPS = 100
SOLVED = 0.99  # of the sequences


def train(name: str, length: int, steps: int, seed: int) -> Net:
    """Train with the module of this name, and keep what the guard has read."""
    task = TemporalOrder(length, batch_size=BATCH_SIZE, train_size=BATCH_SIZE * steps)
    seed_everything(seed, verbose=False)
    model, guard = OrderNamer(task, SWAPS[name]), GradGuard(events=False, incidents=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[guard],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(model, task)
    seconds = time.perf_counter() - started
    [results] = trainer.test(model, task, verbose=False)
    if guard.broken:
        raise RuntimeError("the callback turned itself off; its message is above")
    return Net(
        name=name,
        code=str(model.rnn) if model.pool is None else f"{model.rnn} + {model.pool}",
        losses=torch.stack(model.losses).tolist(),
        accuracy=results["test_accuracy"],
        updates=results.get("update_share", math.nan),
        readings=[reading for reading in guard.time_readings if reading.source == "exact"],
        found=any(f.pathology is Pathology.VANISHING_IN_TIME for f in guard.findings),
        report=str(guard.report()),
        seconds=seconds,
    )


def train_all(names: Sequence[str], length: int, steps: int, seed: int) -> list[Net]:
    """All of them on the same sequences, from the same seed."""
    nets: list[Net] = []
    for name in names:
        net = train(name, length, steps, seed)
        print(f"{name}: {steps} steps in {net.seconds:.0f} s", flush=True)
        if not nets:
            print(f"\nmodel.rnn = {net.code}\n{net.report}\n")
        nets.append(net)
    return nets


def print_table(nets: Sequence[Net]) -> None:
    """Error, and how far the gradient gets, before and after."""
    header = ("", "loss", "accuracy", "half-life", "horizon", "1/1000 left after", "updates")
    rows = [header]
    for net in nets:
        updates = "" if math.isnan(net.updates) else f"{net.updates:.0%}"
        rows.append(
            (
                net.name,
                f"{net.loss:.4f}",
                f"{net.accuracy:.2f}",
                net.both(lambda moment: steps_of(moment.half_life)),
                net.both(lambda moment: steps_of(moment.horizon)),
                net.both(lambda moment: str(moment.reach) if moment.ends else "all"),
                updates,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    print("\nBefore → after training, in timesteps back")
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        print("  ".join(cells).rstrip())


def steps_of(number: float) -> str:
    """A number of timesteps."""
    if math.isnan(number):
        return "?"
    if math.isinf(number) or number > 9999:
        return "∞"
    return f"{number:.1f}" if number < 9.95 else f"{number:.0f}"


def print_verdict(nets: Sequence[Net]) -> None:
    """What came of it, in words."""
    before, *swapped = nets
    solved = [net.name for net in swapped if net.accuracy >= SOLVED]
    others = [net.name for net in swapped if net.accuracy < SOLVED]
    said = "says so" if before.found else "has not said so yet"
    print(
        f"\nWith {before.name} the first timestep receives {before.start.first:.1g} times the "
        f"gradient of the last one; the guard {said}."
    )
    print(f"One line later the task is solved by: {'; '.join(solved) or 'none yet'}.")
    if others:
        print(f"Not (yet) by: {'; '.join(others)}.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Swap a tanh RNN for one remedy after the other.")
    add_training(parser, STEPS, QUICK_STEPS, "recurrent_remedies.png")
    # That the task and the longest dilation can have.
    parser.add_argument("--length", type=at_least(40), default=LENGTH, help=f"timesteps ({LENGTH})")
    parser.add_argument(
        "--only", nargs="+", choices=list(SWAPS)[1:], help="these remedies (all), after the RNN"
    )
    options = parser.parse_args(arguments)
    options.steps = chosen_steps(options, STEPS, QUICK_STEPS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a small recurrent net is slower on several threads
    names = [next(iter(SWAPS)), *(options.only or list(SWAPS)[1:])]
    with quiet():
        nets = train_all(names, options.length, options.steps, options.seed)
    print_table(nets)
    print_verdict(nets)
    save_figure(nets, TemporalOrder(options.length).baseline, options.output)
    print(f"\nThe picture is in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
