"""What is logged, kept and shown of a fit while it runs, and left behind at its end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_gradguard._validation import check_type
from lightning_gradguard.callbacks.progress import ProgressState
from lightning_gradguard.callbacks.recording import Recording
from lightning_gradguard.callbacks.run_directory import wants_files
from lightning_gradguard.callbacks.run_facts import run_info
from lightning_gradguard.callbacks.step_log import LayerRows, StepLog
from lightning_gradguard.callbacks.surroundings import logged_step
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record.gallery import Gallery
from lightning_gradguard.record.live_history import live_history
from lightning_gradguard.record.run_history import RunHistory, RunInfo, RunStatus


class Records:
    """Metrics for the loggers, the state for the progress bar, the history and the report.

    Args:
        layer_depth: Components of the module path that make a layer in metric keys; ``None`` for
            the whole path, as far as there is room for.
        events: Whether findings and actions are kept on disk.
        history: Whether to keep the run's numbers with them.
        report: Whether to write a report of it all at the end.

    Raises:
        TypeError: If ``history`` or ``report`` is not a bool.
    """

    def __init__(
        self, layer_depth: int | None, *, events: bool, history: bool, report: bool
    ) -> None:
        check_type("history", history, bool, "True or False")
        check_type("report", report, bool, "True or False")
        self.layer_depth = layer_depth
        self.history = history
        self.report = report
        self._keeps = events and history
        self._engines: list[GuardEngine] = []
        self._info = RunInfo()
        self._log, self._rows = StepLog(layer_depth), LayerRows()
        self._progress = ProgressState()
        self._recording: Recording | None = None
        self._gallery: Gallery | None = None

    def start(
        self,
        trainer: Trainer,
        module: LightningModule,
        guards: Sequence[object],
        guarded: Sequence[tuple[GuardEngine, Optimizer]],
        folder: Path | None,
        *,
        resumed: bool,
    ) -> None:
        """Begin with a fit.

        Args:
            trainer: Its Trainer; training has started.
            module: The model.
            guards: The guards on the Trainer, for their settings.
            guarded: Each engine with its optimizer.
            folder: The run's ``gradguard`` directory; ``None`` to write no files.
            resumed: Whether the fit goes on from a checkpoint.
        """
        self._engines = [engine for engine, _ in guarded]
        self._log, self._rows = StepLog(self.layer_depth, len(self._engines)), LayerRows()
        self._progress.attach(trainer, self._engines)
        trial_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set late
        if not self._engines or trial_run or not trainer.is_global_zero:
            return
        self._info = run_info(guards, trainer, module, guarded)
        recorders = [engine.recorder for engine in self._engines]
        step = partial(logged_step, trainer)
        self._gallery = Gallery(trainer.loggers, self._info, recorders, step)
        if self._keeps and folder is not None and wants_files(trainer):
            self._recording = Recording(
                folder, self._info, self._engines, report=self.report, resumed=resumed
            )

    def log(self, module: LightningModule) -> None:
        """Log the step that is over, at a step at which the Trainer logs.

        Args:
            module: The model, through which metrics reach the loggers.
        """
        layers: dict[str, float] = {}
        for engine in self._engines:
            module.log_dict(self._log.metrics(engine), on_step=True, on_epoch=False)
            layers |= self._log.layers(engine)
        self._rows.log(module.trainer, layers)
        if self._recording is not None:
            self._recording.logged()
        if self._gallery is not None:
            self._gallery.look(self._read)

    def tick(self) -> None:
        """After every batch: write what has waited long enough."""
        if self._recording is not None:
            self._recording.tick()

    def hide(self) -> None:
        """Leave the progress bar as it was."""
        self._progress.detach()

    def close(self, status: RunStatus, error: str = "") -> None:
        """Write what is left, and the report. Again, it does nothing.

        Args:
            status: How the fit ended.
            error: Its exception, if it failed.
        """
        self.hide()
        report = self._recording.close(status, error) if self._recording is not None else None
        if self._gallery is not None:
            self._gallery.close(self._read, report)
        self._recording = self._gallery = None

    def _read(self) -> RunHistory:
        if self._recording is not None:
            return self._recording.read()
        parts = [live_history(engine.recorder, engine.counts) for engine in self._engines]
        return RunHistory(self._info, tuple(parts))
