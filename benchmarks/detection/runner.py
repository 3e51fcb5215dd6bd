"""One run of one program: trained as a user would, watched by us and by every peer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.detection.features import FeatureReader
from benchmarks.detection.records import Alarm, Peer, Program, RunResult, Setup
from lightning_gradguard.diagnose import Finding, Observation
from lightning_gradguard.dry_run import locate_non_finite
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record import Recorder

# Three epochs of the digits, which is how often AutoTrainer looks.
ACCURACY_EVERY_N_STEPS = 60
# A run whose weights have been NaN for so long has nothing left to show.
HOPELESS_STEPS = 50


class Tape:
    """A detector that finds nothing and keeps all that detectors are given."""

    def __init__(self) -> None:
        self.observations: list[Observation] = []

    def observe(self, observation: Observation) -> list[Finding]:
        """Keeps one step."""
        self.observations.append(observation)
        return []

    def is_open(self, where: str) -> bool:
        """Nothing is found, so nothing is open."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """There is none to continue from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def reset(self) -> None:
        """Forgets everything."""
        self.observations = []


class Clock:
    """Seconds spent in each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done within it belongs to this part."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - start


class GuardedRun:
    """A set-up under a guard that observes, and a clock that knows its share.

    The guard does most of its work in a hook of the optimizer: one hook before it and one after
    take the time.
    """

    def __init__(self, setup: Setup, steps: int) -> None:
        self.setup = setup
        self.clock = Clock()
        self.tape = Tape()
        self._start = 0.0
        self._handles = [setup.optimizer.register_step_post_hook(self._begin)]
        with self.clock.part("guard"):
            self.guard = _make_guard(setup.model, setup.optimizer, steps)
        self._handles.append(setup.optimizer.register_step_post_hook(self._end))
        diagnosis = self.guard._pipeline._diagnosis  # noqa: SLF001 - to see what detectors see
        diagnosis.detectors = (*diagnosis.detectors, self.tape)
        self.reader = FeatureReader(setup.model, setup.optimizer, steps)

    def step(self, number: int, peers: Sequence[Peer], alarms: dict[str, list[Alarm]]) -> float:
        """One step of training; returns its loss."""
        setup, clock, accuracy = self.setup, self.clock, None
        if setup.accuracy is not None and number % ACCURACY_EVERY_N_STEPS == 0:
            self.guard.pause()
            with clock.part("features"):
                accuracy = setup.accuracy()
            self.guard.resume()
        with clock.part("run"), self.reader.watching():
            batch = setup.batch(number)
            loss = setup.loss(batch)
            setup.optimizer.zero_grad()
            loss.backward()
            value = float(loss.detach())
        with clock.part("features"):
            features = self.reader.read(number, value, batch, accuracy)
        for peer in peers:
            with clock.part(peer.name):
                alarms[peer.name] += peer.observe(features)
        with clock.part("run"):
            if setup.before_step is not None:
                setup.before_step()
        with clock.part("guard"):
            self.guard.before_step(loss.detach())
            if self.guard.needs_origin:
                self._locate(batch)
        in_hook = clock.seconds["guard"]
        with clock.part("run"):
            setup.optimizer.step()
            if setup.after_step is not None:
                setup.after_step(number)
        clock.seconds["run"] -= clock.seconds["guard"] - in_hook
        return value

    def _locate(self, batch: Any) -> None:
        """Looks again at a step that is not finite, as the callbacks do."""
        setup = self.setup
        origin = locate_non_finite(setup.model, batch, loss=lambda _, again: setup.loss(again))
        if origin is not None:
            self.guard.explain(origin)
        self.guard.discard()

    def close(self) -> None:
        """Ends it and takes all hooks off.

        Raises:
            RuntimeError: If the guard had turned itself off, which would pass for silence.
        """
        if not self.guard.active:
            raise RuntimeError("the guard has turned itself off, see the log")
        with self.clock.part("guard"):
            self.guard.close()
        self.reader.close()
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: object) -> None:
        self._start = perf_counter()

    def _end(self, *_: object) -> None:
        self.clock.seconds["guard"] += perf_counter() - self._start


def run(program: Program, seed: int, peers: Sequence[Peer] = ()) -> RunResult:
    """Trains a program from a seed under the eyes of all.

    Args:
        program: What is trained.
        seed: From which everything random in it follows.
        peers: New ones: each keeps what it has seen.
    """
    setup = program.build(seed)
    guarded = GuardedRun(setup, program.steps)
    alarms: dict[str, list[Alarm]] = {peer.name: [] for peer in peers}
    hopeless = 0
    for number in range(program.steps):
        loss = guarded.step(number, peers, alarms)
        lost = not math.isfinite(loss) and not _is_finite(setup.model)
        hopeless = hopeless + 1 if lost else 0
        if hopeless >= HOPELESS_STEPS:
            break
    for peer in peers:
        with guarded.clock.part(peer.name):
            alarms[peer.name] += peer.finish()
    guarded.close()
    score = setup.score() if _is_finite(setup.model) else math.nan
    return RunResult(
        program=program.name,
        family=program.family,
        seed=seed,
        steps=program.steps,
        score=score,
        label=label(program, score),
        causes=program.causes,
        layers=program.layers,
        onset=program.onset,
        findings=guarded.guard.findings,
        alarms=alarms,
        observations=guarded.tape.observations,
        seconds=dict(guarded.clock.seconds),
    )


def label(program: Program, score: float) -> str:
    """``"failing"``, ``"healthy"``, or ``"ambiguous"`` if fault and score do not go together."""
    reached = program.reached(score)
    if program.faulty:
        return "ambiguous" if reached else "failing"
    return "healthy" if reached else "ambiguous"


def _make_guard(model: nn.Module, optimizer: Optimizer, steps: int) -> GuardEngine:
    return GuardEngine(
        model,
        optimizer,
        mode="observe",
        planned_steps=steps,
        recorder=Recorder(silent=True),
    )


def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
