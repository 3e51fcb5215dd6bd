"""See how far the gradient travels back through time while recurrent nets train.

scikit-learn's 8x8 digits come in as sequences of 64 pixels, and the loss sees only the state after
the last one. Four fused modules of torch (tanh RNN, ReLU RNN, LSTM and GRU, 64 units) are trained
in an ordinary Lightning Trainer with ``callbacks=[GradientMonitor(exact_every_n_steps=...)]``. A
fifth, linear one is the picture of every textbook: its recurrent weight is 0.8 times an orthogonal
matrix, so that the gradient must be 0.8^50 of itself after 50 steps back. It is measured too.

    python examples/gradient_through_time.py            # 600 steps each, about a minute
    python examples/gradient_through_time.py --quick    # 100 steps each
    python examples/gradient_through_time.py --help

It needs scikit-learn, matplotlib and rich beside this package, and no network.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from arguments import add_training, chosen_steps
from digits import quiet
from digits_task import PixelSequences, SequenceClassifier
from gradient_through_time_figure import save_figure
from gradient_through_time_nets import (
    FACTOR,
    KINDS,
    LAG,
    Classifier,
    LinearClassifier,
    Net,
    reached,
    reaches_all,
    relative,
)
from lightning.pytorch import Trainer, seed_everything

from lightning_gradguard import GradientMonitor
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.time_table import format_time_table

STEPS = 600
QUICK_STEPS = 100
COLUMNS = 200  # of a heat map: more exact measurements than this cannot be told apart


# -- the runs --------------------------------------------------------------------------------------


def train(name: str, model: SequenceClassifier, steps: int, seed: int) -> Net:
    """Train, test, and keep what the monitor has read."""
    data = PixelSequences(steps, seed)
    every = max(2, round(steps / COLUMNS))
    monitor = GradientMonitor(events=False, exact_every_n_steps=every)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,  # after the measurement
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    [results] = trainer.test(model, data, verbose=False)
    if monitor.broken:
        raise RuntimeError("the callback turned itself off; its message is above")
    exact = [reading for reading in monitor.time_readings if reading.source == "exact"]
    return Net(name, results["test_accuracy"], exact)


def train_all(steps: int, seed: int) -> list[Net]:
    """The four nets, from the same seed and in the same order of batches."""
    nets = []
    for kind in KINDS:
        seed_everything(seed, verbose=False)
        started = time.perf_counter()
        nets.append(train(kind, Classifier(kind), steps, seed))
        print(f"{kind}: {steps} steps in {time.perf_counter() - started:.0f} s", flush=True)
    return nets


def measure_textbook(seed: int) -> TimeReading:
    """The linear RNN before its first step."""
    seed_everything(seed, verbose=False)
    return train("linear RNN", LinearClassifier(), 1, seed).start


# -- what it says ----------------------------------------------------------------------------------


def sentence(net: Net) -> str:
    """What the picture shows of one net."""
    return (
        f"{net.name}: before training {journey(net.start)}; {opening(net)}; "
        f"at the end {journey(net.end)}, and the test accuracy is {net.accuracy:.2f}."
    )


def journey(reading: TimeReading) -> str:
    """How much of the gradient arrives where."""
    if reaches_all(reading):
        first = relative(reading)[-1]
        return f"the first timestep receives {first:.2g} times the norm of the last"
    return (
        f"the gradient {pace(reading.decay_rate)} and falls below 1/1000 within "
        f"{reached(reading)} of {len(reading.profile) - 1} steps back"
    )


def pace(rate: float) -> str:
    if math.isnan(rate):
        return "has no known rate"
    if rate == 0.0:
        return "keeps its norm"
    return f"{'halves' if rate < 0.0 else 'doubles'} every {math.log(2.0) / abs(rate):.1f} steps"


def opening(net: Net) -> str:
    """When more than 1/1000 of the gradient reaches every timestep."""
    first = next((r.step for r in net.readings if reaches_all(r)), None)
    last_closed = max((r.step for r in net.readings if not reaches_all(r)), default=-1)
    for_good = next((r.step for r in net.readings if r.step > last_closed), None)
    if first is None:
        return "more than 1/1000 reaches every timestep at no step of training"
    if for_good is None:
        return f"more than 1/1000 reaches every timestep at step {first}, but not to the end"
    if first == for_good:
        return f"from step {first} on more than 1/1000 reaches every timestep"
    return (
        f"more than 1/1000 reaches every timestep at step {first} for the first time, and from "
        f"step {for_good} on whenever it is measured"
    )


def print_findings(nets: Sequence[Net], textbook: TimeReading) -> None:
    before = [replace(net.start, module=net.name) for net in nets]
    before.append(replace(textbook, module="linear RNN"))
    after = [replace(net.end, module=net.name) for net in nets]
    print(f"\nBefore the first step\n{format_time_table(before)}")
    print(f"\nMean over the last tenth of training\n{format_time_table(after)}")
    print("\n" + "\n".join(sentence(net) for net in nets))
    measured = relative(textbook)[LAG]
    print(
        f"linear RNN: {LAG} steps back the gradient is {measured:.5g} of itself; "
        f"{FACTOR}^{LAG} is {FACTOR**LAG:.5g}."
    )


# -- the program -----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="See gradients travel back through time.")
    add_training(parser, STEPS, QUICK_STEPS, "gradient_through_time.png")
    options = parser.parse_args(arguments)
    options.steps = chosen_steps(options, STEPS, QUICK_STEPS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a small recurrent net is slower on several threads
    with quiet():
        nets = train_all(options.steps, options.seed)
        textbook = measure_textbook(options.seed)
    print_findings(nets, textbook)
    save_figure(nets, textbook, options.output)
    print(f"\nThe picture is in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
