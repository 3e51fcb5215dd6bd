"""What an engine has found, done and measured, for whoever asks."""

from __future__ import annotations

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.pipeline import Pipeline
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record import OptimizerReport, Recorder, Report, StepRecord
from lightning_gradguard.respond import Action


class EngineResults:
    """Reads the recorder and the counts of one engine.

    Attributes:
        recorder: Where findings and actions go.
    """

    recorder: Recorder
    _pipeline: Pipeline

    @property
    def findings(self) -> list[Finding]:
        """Findings so far, one per cause in its last state, in the order in which they opened."""
        return list(self.recorder.findings)

    @property
    def actions(self) -> list[Action]:
        """What the guard did, oldest first; clips and caps are in :attr:`history`."""
        return list(self.recorder.actions)

    @property
    def history(self) -> list[StepRecord]:
        """The last steps as numbers, oldest first."""
        return self.recorder.history

    @property
    def time_readings(self) -> list[TimeReading]:
        """How gradients travelled through time, as far back as it is kept, oldest first."""
        return self.recorder.readings

    @property
    def counts(self) -> dict[str, int]:
        """Running counts: steps; skipped, clipped and capped ones; findings; rollbacks."""
        return self._pipeline.counts

    @property
    def should_stop(self) -> bool:
        """Whether the ladder is spent and the run should end."""
        ladder = self._pipeline.ladder
        return ladder is not None and ladder.should_stop

    def report(self) -> Report:
        """Findings, remedies and actions; print it, or take it as data."""
        return Report((OptimizerReport.of(self.recorder, self.counts),))
