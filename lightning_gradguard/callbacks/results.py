"""What happened in a fit, over all of its optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record import OptimizerReport, Report, StepRecord
from lightning_gradguard.respond import Action


class Results(ABC):
    """Sums up what the engines have found, done and measured."""

    @property
    @abstractmethod
    def engines(self) -> list[GuardEngine]:
        """One per optimizer, in the Trainer's order; empty before the first fit."""

    @property
    def findings(self) -> list[Finding]:
        """Findings of the last fit, over all optimizers, in order of their steps."""
        found = [finding for engine in self.engines for finding in engine.findings]
        return sorted(found, key=lambda finding: finding.step)

    @property
    def actions(self) -> list[Action]:
        """What was done in the last fit, over all optimizers, in order of steps."""
        done = [action for engine in self.engines for action in engine.actions]
        return sorted(done, key=lambda action: action.step)

    @property
    def history(self) -> list[StepRecord]:
        """The last steps of the first optimizer as numbers; see :attr:`engines` for others."""
        engines = self.engines
        return engines[0].history if engines else []

    @property
    def time_readings(self) -> list[TimeReading]:
        """How gradients travelled through time in the last fit, in order of steps."""
        read = [reading for engine in self.engines for reading in engine.time_readings]
        return sorted(read, key=lambda reading: reading.step)

    @property
    def counts(self) -> dict[str, int]:
        """Running counts over all optimizers."""
        totals: dict[str, int] = {}
        for engine in self.engines:
            for name, count in engine.counts.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def report(self) -> Report:
        """Findings, remedies and actions of the last fit, over all optimizers; print it."""
        return Report(
            tuple(OptimizerReport.of(engine.recorder, engine.counts) for engine in self.engines)
        )
