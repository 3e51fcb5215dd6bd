"""Ratios of time to a bare Trainer, each from two turns that were taken next to each other."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.overhead.contenders import BARE, LOG_EVERY_N_STEPS, Contender
from benchmarks.overhead.turns import Runner, Turn
from benchmarks.overhead.workloads import Workload


@dataclass(frozen=True)
class Schedule:
    """How long is measured.

    Args:
        warm_steps: Steps before the first turn that counts; past the warm-up of every contender.
        rounds: Turns of each contender.
        steps: Steps in a turn.
    """

    warm_steps: int
    rounds: int
    steps: int


@dataclass
class Ratios:
    """Pairs of turns of one contender and of the bare Trainer."""

    pairs: list[tuple[Turn, Turn]] = field(default_factory=list)

    def add(self, turn: Turn, bare: Turn) -> None:
        """Take in one pair."""
        self.pairs.append((turn, bare))

    def summary(self, clock: str, steps: int) -> dict[str, Any]:
        """Quartiles of the ratios, by ``"cpu"`` or ``"wall"`` clock.

        The headline is over turns without a step on which values are logged; what logging adds is
        spread over the logging interval and given apart.
        """
        quiet = [getattr(a, clock) / getattr(b, clock) for a, b in self.pairs if not a.logs]
        logging = [getattr(a, clock) / getattr(b, clock) for a, b in self.pairs if a.logs]
        values = quiet or logging
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result: dict[str, Any] = {"median": median, "quartiles": [low, high], "turns": len(values)}
        share = steps / LOG_EVERY_N_STEPS
        result["with_logging"] = (
            (1 - share) * median + share * statistics.median(logging) if quiet and logging else None
        )
        result["step_ms"] = (
            1e3 * statistics.median(getattr(a, clock) for a, _ in self.pairs) / steps
        )
        return result


def compare(
    workload: Workload,
    contenders: Sequence[Contender],
    schedule: Schedule,
    *,
    optimizer: str,
    device: str,
    directory: Path,
    say: Callable[[str], None],
) -> dict[str, Ratios]:
    """Train with every contender in turns, beside a bare Trainer.

    A round goes bare, a, b, bare, c, d, bare, …: each contender is next to one bare turn. Their
    order changes from round to round.

    Args:
        workload: What to train.
        contenders: All of them, the bare Trainer first.
        schedule: How long.
        optimizer: Key of ``OPTIMIZERS``.
        device: ``"cpu"`` or ``"cuda"``.
        directory: For what they log.
        say: Told about progress.
    """
    batches = workload.make_batches(device)
    order = random.Random(0)
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for contender in contenders:
            module = workload.make_module(optimizer)
            trainer = contender.make_trainer(module, directory / contender.name, device)
            runners[contender.name] = Runner(trainer, module, batches)
            stack.callback(runners[contender.name].stop)
        for name, runner in runners.items():
            say(f"{workload.name}: warming up {name}")
            runner.take_turn(schedule.warm_steps)
        bare = runners.pop(BARE)
        results = {name: Ratios() for name in runners}
        # A full collection visits the objects of all Trainers at once, which no real run has.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        for number in range(schedule.rounds):
            say(f"{workload.name}: round {number + 1} of {schedule.rounds}")
            names = order.sample(list(runners), len(runners))
            _round(names, runners, bare, schedule.steps, results)
    return results


def _round(
    names: list[str],
    runners: dict[str, Runner],
    bare: Runner,
    steps: int,
    results: dict[str, Ratios],
) -> None:
    before = bare.take_turn(steps)
    for first, *second in (names[i : i + 2] for i in range(0, len(names), 2)):
        turn = runners[first].take_turn(steps)
        results[first].add(turn, before)
        turns = [(name, runners[name].take_turn(steps)) for name in second]
        before = bare.take_turn(steps)
        for name, turn in turns:
            results[name].add(turn, before)
