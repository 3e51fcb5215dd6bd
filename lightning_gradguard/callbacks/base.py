"""What the callbacks share: one engine per optimizer, fed from Lightning's hooks."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.callbacks.alerting import start_alerts
from lightning_gradguard.callbacks.asked import RUNGS, asked_for
from lightning_gradguard.callbacks.epoch import EpochNorms, EpochTime
from lightning_gradguard.callbacks.incidents import (
    IncidentKeeper,
    start_incidents,
    steps_to_remember,
)
from lightning_gradguard.callbacks.moments import Moments
from lightning_gradguard.callbacks.non_finite import OriginSearch
from lightning_gradguard.callbacks.records import Records
from lightning_gradguard.callbacks.results import Results
from lightning_gradguard.callbacks.run_directory import run_directory
from lightning_gradguard.callbacks.schedules import ScheduleHold
from lightning_gradguard.callbacks.stopping import StoppedRun
from lightning_gradguard.callbacks.surroundings import Surroundings, logs_now, surroundings
from lightning_gradguard.diagnose import Severity, Thresholds
from lightning_gradguard.dry_run import Preflight, preflight
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.incidents import Incidents
from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.record import AlertSender, EventLog, Recorder
from lightning_gradguard.record.time_statistics import TimeDecayStatistics
from lightning_gradguard.sampling import TimeModules

logger = logging.getLogger("lightning_gradguard")

P = ParamSpec("P")
Self_ = TypeVar("Self_", bound="EngineCallback")

# Their gradients are not on the parameters as torch keeps them, so any norm would be wrong.
_NOT_SUPPORTED = {
    "DeepSpeedStrategy": "it keeps gradients in buffers of its own",
    "FSDPStrategy": "it keeps gradients as shards of flat buffers (use ModelParallelStrategy)",
    "XLAFSDPStrategy": "it keeps gradients as shards of flat buffers",
}


def contained(
    hook: Callable[Concatenate[Self_, P], None],
) -> Callable[Concatenate[Self_, P], None]:
    """Nothing that the guard does itself may end a run: say so once, and go on without it."""

    @functools.wraps(hook)
    def wrapper(self: Self_, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.broken:
            return
        try:
            hook(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
            self.give_up(hook.__name__, error)

    return cast("Callable[Concatenate[Self_, P], None]", wrapper)


class EngineCallback(Results, Callback):
    """Runs a :class:`~lightning_gradguard.guard.GuardEngine` for each of the Trainer's optimizers.

    Args:
        layer_depth: Components of the module path that make a layer in ``grad_norm/<layer>``;
            ``None`` for the whole path.
        events: Whether to append findings and actions to ``gradguard/events.jsonl`` in the run's
            log directory.
        timesteps: Modules whose gradient is measured through time.
        exact_every_n_steps: Steps between exact measurements.
        preflight: Whether to measure the first batch before the first step.
        thresholds: What counts as a finding.
        incidents: What is kept of steps that go wrong.
        history: Whether to keep the run's numbers in ``gradguard/history`` in the run's directory.
        report: Whether to write ``gradguard/report.html`` there at the end.

    Attributes:
        precedence: Of several guards on one Trainer the least runs the engines, and its settings
            of what is measured and recorded count.
    """

    precedence = 2

    def __init__(
        self,
        layer_depth: int | None,
        *,
        events: bool,
        timesteps: TimeModules | None,
        exact_every_n_steps: int,
        preflight: bool,
        thresholds: Thresholds = Thresholds(),
        incidents: Incidents | bool = True,
        history: bool = True,
        report: bool = True,
    ) -> None:
        super().__init__()
        if layer_depth is not None:
            check_number("layer_depth", layer_depth, at_least=1, integer=True)
        check_type("events", events, bool, "True or False")
        check_type("preflight", preflight, bool, "True or False")
        check_number("exact_every_n_steps", exact_every_n_steps, at_least=1, integer=True)
        check_type("thresholds", thresholds, Thresholds, "a Thresholds")
        check_type("incidents", incidents, (bool, Incidents), "an Incidents, True or False")
        _check_timesteps(timesteps)
        self.layer_depth = layer_depth
        self.events = events
        self.timesteps = timesteps
        self.exact_every_n_steps = exact_every_n_steps
        self.preflight = preflight
        self.thresholds = thresholds
        self.keeps_history = history
        self.writes_report = report
        self._records = Records(layer_depth, events=events, history=history, report=report)
        self._asked: dict[str, Any] = {}
        self._alerts: AlertSender | None = None
        self.preflight_result: Preflight | None = None
        self._before_flight = False
        self.broken = False
        self._engines: list[GuardEngine] = []
        self._by_optimizer: dict[int, GuardEngine] = {}
        self._losses: list[Tensor] = []
        self._steps_before: list[int] = []
        self._epoch = EpochNorms()
        self._epoch_time = EpochTime()
        self._schedules = ScheduleHold()
        self._stopped = StoppedRun(None)
        self.incidents = incidents
        self._moments = Moments()
        self._origins = OriginSearch(self._moments)
        self._incidents: IncidentKeeper | None = None
        self._leader: EngineCallback | None = None
        self._in_step = False
        self._restored: dict[str, Any] | None = None
        self._final_state: dict[str, Any] | None = None

    def asks(self) -> Mapping[str, Any]:
        """What the user has asked for by this callback, see :mod:`.asked`."""
        return {}

    def offers(self) -> Mapping[str, Any]:
        """What it does unless another callback asks for something else."""
        return {}

    def _make_engine(
        self, model: LightningModule, optimizer: Optimizer, run: Surroundings
    ) -> GuardEngine:
        """The engine that this callback runs, with what all on its Trainer ask for."""
        rungs = {name: self._asked.get(name) for name in RUNGS}
        protects = any(response is not None for response in rungs.values())
        return GuardEngine(
            model,
            optimizer,
            mode="protect" if protects else "observe",
            timesteps=self.timesteps,
            exact_every_n_steps=self.exact_every_n_steps,
            thresholds=self.thresholds,
            **rungs,
            **run,
        )

    @property
    @override
    def engines(self) -> list[GuardEngine]:
        """One per optimizer, in the Trainer's order; empty before the first fit.

        Of several guards and monitors on one Trainer, all see the engines of one of them: gradients
        are measured once, and in whatever order the callbacks are listed.
        """
        return list(self._engines) if self._leader is None else self._leader.engines

    @property
    def time_statistics(self) -> dict[str, TimeDecayStatistics]:
        """Over the last epoch, for each module, layer and direction; each can ``plot()`` itself."""
        return self._epoch_time.metrics if self._leader is None else self._leader.time_statistics

    # -- Lightning's hooks -----------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What the user has misspelled is said before training starts, and not contained.
        asked = asked_for(_guards_on(trainer))
        if asked.get("vanishing") is not None:
            asked["vanishing"].check(pl_module)
        if self.timesteps is not None:
            TimestepProbe(pl_module, self.timesteps).close()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.broken = False  # what went wrong in an earlier fit need not in this one
        self._start(trainer, pl_module, run_directory(trainer))
        # All ranks guard, or none does: the others would wait for the numbers of one that is off.
        if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(not self.broken):
            self.give_up("on_train_start of another rank")
            self._by_optimizer = {}

    @contained
    def _start(self, trainer: Trainer, pl_module: LightningModule, directory: Path | None) -> None:
        # Fresh engines for each fit: Lightning makes new optimizers for each of them.
        self._close()
        self._engines, self._by_optimizer, self._final_state = [], {}, None
        self._losses.clear()
        guards = _guards_on(trainer)
        leader = min(guards, key=lambda guard: (guard.precedence, type(guard).__name__))
        self._leader = None if leader is self else leader
        self._asked = asked_for(guards)
        if self._leader is not None:
            return
        self._epoch, self._epoch_time = EpochNorms(), EpochTime()
        self._schedules = ScheduleHold()  # a fit that broke off may have left something
        self._moments = Moments(steps_to_remember(trainer.optimizers) if self.incidents else 1)
        self._origins = OriginSearch(self._moments)
        self._before_flight = self.preflight
        strategy = type(trainer.strategy).__name__
        if strategy in _NOT_SUPPORTED:
            logger.warning(
                "%s is off: %s is not supported, because %s.",
                type(self).__name__,
                strategy,
                _NOT_SUPPORTED[strategy],
            )
            return
        if trainer.gradient_clip_val:
            logger.info(
                "Trainer(gradient_clip_val=%s) clips after %s: grad_norm/total is the norm before "
                "both, grad_norm/total_clipped the one between them.",
                trainer.gradient_clip_val,
                type(self).__name__,
            )
        trial_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set late
        folder = directory / "gradguard" if directory and not trial_run else None
        self._stopped = StoppedRun(folder)
        # One file and one writer for all optimizers.
        writes = self.events and folder is not None and trainer.is_global_zero
        events = EventLog(folder / "events.jsonl") if writes and folder is not None else None
        for number, optimizer in enumerate(trainer.optimizers):
            label = f"optimizer{number}" if len(trainer.optimizers) > 1 else ""
            recorder = Recorder(label, silent=not trainer.is_global_zero)
            recorder.events = events
            self._add_engine(pl_module, optimizer, surroundings(trainer, optimizer, recorder))
        explicit = self.timesteps not in (None, "auto")
        if explicit and not any(engine.watched_in_time for engine in self._engines):
            logger.warning(
                "timesteps=%r names no module that an optimizer trains: none is watched through "
                "time.",
                self.timesteps,
            )
        resumed = self._restore()
        self._incidents = start_incidents(
            self.incidents, folder, self._moments, trainer, pl_module, self._engines
        )
        guarded = [
            (self._by_optimizer[id(optimizer)], optimizer)
            for optimizer in trainer.optimizers
            if id(optimizer) in self._by_optimizer
        ]
        self._records.start(trainer, pl_module, guards, guarded, folder, resumed=resumed)
        self._alerts = start_alerts(
            self._asked.get("alert"), trainer, [e.recorder for e in self._engines]
        )

    def _add_engine(self, model: LightningModule, optimizer: Optimizer, run: Surroundings) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            logger.warning(
                "%s leaves LBFGS alone: it evaluates the loss several times inside one step.",
                type(self).__name__,
            )
            return
        engine = self._make_engine(model, optimizer, run)
        self._engines.append(engine)
        self._by_optimizer[id(optimizer)] = engine

    @override
    @contained
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._schedules.release_plateaus()
        if self._before_flight and self._engines:
            self._before_flight = False
            self._run_preflight(trainer, pl_module, batch)
        self._steps_before = [engine.step for engine in self._engines]
        if self._engines:
            self._moments.remember(pl_module, batch, batch_idx, self._engines)

    def _run_preflight(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        modules = self.timesteps or ()
        try:
            self.preflight_result = preflight(
                pl_module, batch, modules=modules, verbose=trainer.is_global_zero
            )
        except Exception as error:  # noqa: BLE001 - no reason not to train
            logger.warning("%s leaves out the preflight: %s", type(self).__name__, error)
        finally:
            for engine in self._engines:
                engine.discard()

    @override
    @contained
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self._engines:
            self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        engine = self._by_optimizer.get(id(optimizer))
        if engine is None:
            return
        self._in_step = False
        self._before_step(trainer, pl_module, optimizer, engine)
        if self.broken and not self._in_step:
            engine.before_step()  # does nothing but tell the other ranks, which may wait for us

    @contained
    def _before_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
        engine: GuardEngine,
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = self._step_loss(scaler)
        self._in_step = True
        self._schedules.release(trainer, optimizer)  # its step before this one in the same batch
        if engine.owes_hold:  # before the guard puts its scale on the schedule's rate
            engine.settle_hold()
            self._schedules.hold(trainer, optimizer, _steps_taken(engine))
        engine.before_step(loss, scaler=scaler)
        self._moments.tell(loss)
        if engine.needs_origin:
            if self._incidents is not None:
                self._incidents.before_update(self._engines.index(engine))
            self._origins.look(pl_module, engine)
        if engine.dropping:
            self._schedules.hold(trainer, optimizer, _steps_taken(engine))
        if engine.should_stop:
            trainer.should_stop = True

    def _step_loss(self, scaler: torch.amp.GradScaler | None) -> Tensor | None:
        """The loss that led to this step: micro-batches add up, as Lightning divides each."""
        losses, self._losses = self._losses, []
        if not losses:
            return None
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return total / scaler.get_scale() if scaler is not None else total

    @override
    @contained
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._schedules.release(trainer)
        if self._incidents is not None:
            self._incidents.after_update()
        self._moments.forget()
        for engine in self._engines:
            self._epoch.add(engine)
            self._epoch_time.add(engine)
        stepped = [engine.step for engine in self._engines] != self._steps_before
        if stepped and logs_now(trainer):
            self._log_step(pl_module)
        self._records.tick()
        if any(engine.should_stop for engine in self._engines):
            trainer.should_stop = True
            self._stopped.save(trainer, self)

    def _log_step(self, pl_module: LightningModule) -> None:
        self._records.log(pl_module)

    @override
    @contained
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._records.tick()
        for engine in self._engines:
            engine.pause()

    @override
    @contained
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for engine in self._engines:
            engine.resume()

    @override
    @contained
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._schedules.release_plateaus()  # before those that count epochs take their step
        metrics = {**self._epoch.compute(), **self._epoch_time.compute()}
        if metrics:
            pl_module.log_dict(metrics, on_step=False, on_epoch=True)

    @override
    @contained
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._final_state = self.state_dict()
        self._close()
        if self._incidents is not None:
            self._incidents.after_update()
        self._close_incidents()
        stopped = any(engine.should_stop for engine in self._engines)
        self._records.close("stopped" if stopped else "finished")
        serious = [f for f in self.findings if f.severity >= Severity.WARNING]
        if trainer.is_global_zero and not self._leader and (serious or self.actions):
            self._tell()

    def _tell(self) -> None:
        """Show the report: a person at a terminal gets the table, a log file the text."""
        if sys.stderr.isatty():
            self.report().print(sys.stderr)
        else:
            logger.warning("%s", self.report())

    @override
    @contained
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()
        if self._incidents is not None:
            self._incidents.on_exception(exception)
        self._close_incidents()
        by_hand = isinstance(exception, KeyboardInterrupt)
        error = f"{type(exception).__name__}: {exception}".strip(": ")
        self._records.close("stopped" if by_hand else "failed", error)

    @override
    @contained
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    # -- state -----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._final_state is not None:
            return self._final_state
        if self.broken:
            return {"engines": []}
        try:
            return {"engines": [engine.state_dict() for engine in self._engines]}
        except Exception as error:  # noqa: BLE001 - the checkpoint is worth more than our part of it
            self.give_up("state_dict", error)
            return {"engines": []}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Optimizers, and so engines, exist only once training starts.
        self._restored = state_dict

    def _restore(self) -> bool:
        """Continue where a checkpoint was saved; returns whether there was one."""
        restored, self._restored = self._restored, None
        if restored is None:
            return False
        states = restored["engines"]
        if len(states) != len(self._engines):
            logger.warning(
                "%s starts afresh: the checkpoint has the state of %d optimizers, this run has %d.",
                type(self).__name__,
                len(states),
                len(self._engines),
            )
            return False
        for engine, state in zip(self._engines, states, strict=True):
            engine.load_state_dict(state)
        return True

    def _close(self) -> None:
        self._records.hide()
        for engine in self._engines:
            engine.close()
            if engine.recorder.events is not None:
                engine.recorder.events.close()
        self._close_alerts()  # last: closing an engine takes in its last steps

    def _close_incidents(self) -> None:
        incidents, self._incidents = self._incidents, None
        if incidents is not None:
            incidents.close()
        self._moments.clear()

    def _close_alerts(self) -> None:
        alerts, self._alerts = self._alerts, None
        if alerts is not None:
            alerts.close()

    def give_up(self, where: str, error: Exception | None = None) -> None:
        """Report an internal error once, take everything off, and let training go on."""
        if self.broken:
            return
        self.broken = True
        logger.error(
            "%s is off because of an internal error in %s; training goes on without it.",
            type(self).__name__,
            where,
            exc_info=error,
        )
        for engine in self._engines:
            engine.fail()
            if engine.recorder.events is not None:
                engine.recorder.events.close()
        self._close_alerts()
        self._close_incidents()
        try:
            self._records.close("stopped", f"the guard is off because of an error in {where}")
        except Exception as second:  # noqa: BLE001 - the first one is told of already
            logger.warning("The rest of the history is not written: %s", second)


def _steps_taken(engine: GuardEngine) -> int:
    return engine.step - engine.counts["skipped_steps"]


def _guards_on(trainer: Trainer) -> list[EngineCallback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set late
    return [callback for callback in callbacks if isinstance(callback, EngineCallback)]


def _check_timesteps(timesteps: object) -> None:
    """Raise unless ``timesteps`` is what `TimestepProbe` can take; names are looked up later."""
    if timesteps is None or timesteps == "auto":
        return
    if isinstance(timesteps, str) or not isinstance(timesteps, (Sequence, Mapping)):
        kind = ValueError if isinstance(timesteps, str) else TypeError
        raise kind(
            "timesteps must be 'auto', a list of module names, a mapping of module names to time "
            f"axes, or None, got {timesteps!r}"
        )
