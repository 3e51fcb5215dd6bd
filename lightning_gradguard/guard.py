"""The guard of one optimizer in a plain torch loop: everything that touches tensors.

::

    loss.backward()
    guard.before_step(loss)   measure -> hold the step to its bounds: clip, drop, copy near the cap
    optimizer.step()          -> post-step hook: cap the update -> diagnose, respond, record
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard._validation import (
    check_choice,
    check_number,
    check_observes,
    check_type,
)
from lightning_gradguard.diagnose import Pathology, Thresholds
from lightning_gradguard.engine_results import EngineResults
from lightning_gradguard.measure import GradNorms
from lightning_gradguard.measure.model_facts import model_facts
from lightning_gradguard.measure.readback import DelayedRead
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.pipeline import Outcome, Pipeline
from lightning_gradguard.readings import NonFiniteOrigin
from lightning_gradguard.record import Recorder
from lightning_gradguard.respond import (
    AdaptiveClip,
    ClipStrategy,
    LayerBoost,
    LearningRateBackoff,
    SkipBadSteps,
    UpdateCap,
    VanishingRegularizer,
    WeightRollback,
)
from lightning_gradguard.respond.agreement import Agreement
from lightning_gradguard.respond.apply import FusedControls, apply_on_host, runs_fused
from lightning_gradguard.respond.clip_thresholds import strategy_of
from lightning_gradguard.respond.clippers import GradientClipper
from lightning_gradguard.respond.clipping import check_clip
from lightning_gradguard.respond.ladder import Ladder, LadderSettings
from lightning_gradguard.respond.learning_rate import ScaledLearningRate
from lightning_gradguard.respond.vanishing_response import VanishingResponse
from lightning_gradguard.respond.weight_keeper import WeightKeeper
from lightning_gradguard.samplers import Samplers
from lightning_gradguard.sampling import EXACT_EVERY_N_STEPS, TimeModules
from lightning_gradguard.steps import Step
from lightning_gradguard.watched import WatchedParameters, loss_sign

logger = logging.getLogger("lightning_gradguard")

# Steps between a decision on the device and its reading on the host: enough for the copy to have
# arrived on any accelerator, so that the host never waits.
DEVICE_DELAY = 2
# Of what `state_dict` holds; another one is not understood.
STATE_VERSION = 4


class GuardEngine(EngineResults):
    """Watches and protects one optimizer in a plain torch loop.

    Args:
        model: The module whose parameter names appear in findings.
        optimizer: The optimizer that steps. Only its parameters are measured.
        mode: ``"protect"``, or ``"observe"`` to measure and find without ever changing a bit, and
            then no response may be asked for.
        clip: How gradients are clipped: adaptively by default, or ``None`` for not at all.
        cap: Cap on relative updates; by default one that holds once the loss has risen under large
            ones. ``None`` for none.
        skip: Skipping of bad steps, or ``None`` for none.
        backoff: Learning-rate back-off, or ``None`` for none.
        vanishing: Regularizer that keeps the gradient through time from vanishing; default none.
        boost: Larger updates for layers that a gradient which vanishes through depth leaves behind;
            default none.
        rollback: Going back to earlier weights, or ``None`` for none. Copies are not part of
            :meth:`state_dict`: a resumed run makes its first one on its first healthy step.
        timesteps: Modules whose gradient is measured through time: ``"auto"`` for all recurrent
            ones and attention encoders; names or patterns; names with the time axis of the output,
            for modules of other types; ``None`` for none.
        exact_every_n_steps: Steps between exact measurements of recurrent modules. Default 300:
            each costs 0.6 to 1.6 training steps, so that time takes at most 1% of the run.
        thresholds: What counts as a finding.
        trained_elsewhere: Parameters of the model that other optimizers update, as in a GAN, so
            that they are not said to be in none. Default: none.
        planned_steps: Optimizer steps that the run is planned to take, by which patience is
            measured; ``None`` (default) if not known.
        precision: Precision of the run as Lightning names it, ``"16-mixed"``; default: not known.
        optimizers: Optimizers of the run. Default 1; with several, the course of a loss is no
            reason to warn or to respond.
        recorder: Where findings and actions go. Default: memory and the console.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the optimizer cannot be guarded.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> guard = GuardEngine(model, optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(2, 3)).square().mean()
        ...     loss.backward()
        ...     guard.before_step(loss)
        ...     optimizer.step()
        >>> [row.step for row in guard.history]
        [0, 1, 2]
        >>> guard.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        mode: str = "protect",
        clip: ClipStrategy | None = AdaptiveClip(),
        cap: UpdateCap | None = UpdateCap(on_evidence=True),
        skip: SkipBadSteps | None = SkipBadSteps(),
        backoff: LearningRateBackoff | None = LearningRateBackoff(),
        vanishing: VanishingRegularizer | None = None,
        boost: LayerBoost | None = None,
        rollback: WeightRollback | None = WeightRollback(),
        timesteps: TimeModules | None = "auto",
        exact_every_n_steps: int = EXACT_EVERY_N_STEPS,
        thresholds: Thresholds | None = None,
        trained_elsewhere: Collection[nn.Parameter] = (),
        planned_steps: int | None = None,
        precision: str = "",
        optimizers: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        check_type("model", model, nn.Module, "a torch.nn.Module")
        check_type("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        check_choice("mode", mode, ("protect", "observe"))
        check_clip(clip)
        for name, value, kind in (
            ("cap", cap, UpdateCap),
            ("skip", skip, SkipBadSteps),
            ("backoff", backoff, LearningRateBackoff),
            ("vanishing", vanishing, VanishingRegularizer),
            ("boost", boost, LayerBoost),
            ("rollback", rollback, WeightRollback),
            ("thresholds", thresholds, Thresholds),
            ("recorder", recorder, Recorder),
        ):
            check_type(name, value, (kind, type(None)), f"a {kind.__name__} or None")
        if planned_steps is not None:
            check_number("planned_steps", planned_steps, at_least=1, integer=True)
        check_type("precision", precision, str, "a string")
        check_number("optimizers", optimizers, at_least=1, integer=True)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(  # noqa: TRY004 - of the right type, but not one that can be guarded
                "optimizer must take one gradient per step, got LBFGS, which evaluates the loss "
                "several times inside one step and cannot be guarded"
            )
        check_observes(
            mode,
            {
                "clip": clip,
                "cap": cap,
                "skip": skip,
                "backoff": backoff,
                "rollback": rollback,
                "vanishing": vanishing,
                "boost": boost,
            },
            _DEFAULTS,
        )
        if vanishing is not None:
            vanishing.check(model)
        protecting = mode == "protect"
        self.mode = mode
        self.active, self.step, self.last_norms_step = True, 0, -1
        self.last_norms: GradNorms | None = None
        self.recorder = recorder if recorder is not None else Recorder()
        self._model = model
        self._optimizer = optimizer
        self._cap, self._clip = (cap, clip) if protecting else (None, None)
        self._rate = ScaledLearningRate(optimizer)
        self._fused = runs_fused(optimizer)
        self._controls = FusedControls(optimizer)
        self._late: DelayedRead[Step] = DelayedRead(DEVICE_DELAY)
        groups = optimizer.param_groups
        self._sharded = any(local_tensor(p) is not p for g in groups for p in g["params"])
        self._agreement = Agreement(
            enabled=protecting or self._sharded, delay=DEVICE_DELAY if self._fused else 0
        )
        rungs = LadderSettings(clip, cap, skip, backoff, rollback) if protecting else None
        self._pipeline = Pipeline(
            None if rungs is None else Ladder(rungs, in_a_game=optimizers > 1),
            thresholds,
            self.recorder,
        )
        self._planned_steps, self._precision, self._optimizers = (
            planned_steps,
            precision,
            optimizers,
        )
        self._samplers = Samplers(
            model,
            optimizer,
            timesteps,
            exact_every_n_steps,
            trained_elsewhere,
            delay=DEVICE_DELAY if self._fused else 0,
            silent=self.recorder.silent,
        )
        self._keeper = self._make_keeper(rollback, trained_elsewhere) if protecting else None
        # Found by this rank and unknown to the others; whether weights were just put back.
        self._broken, self._put_back_now, self._owed_holds = False, False, 0
        self._vanishing = VanishingResponse(
            model,
            vanishing if protecting else None,
            boost if protecting else None,
            silent=self.recorder.silent,
        )
        self._current: Step | None = None
        self._late_signal: list[float] = []
        self._watch_parameters()
        self._hook = optimizer.register_step_post_hook(self._post_step_hook)

    @property
    def dropping(self) -> bool:
        """Whether the coming step is known to be dropped.

        ``False`` for a fused optimizer: its steps are dropped on the device, unknown to the host.
        """
        return self._current is not None and self._current.dropped

    @property
    def owes_hold(self) -> bool:
        """Whether a step was dropped while its schedule advanced, as it was known too late.

        The schedule is then to be held back at a later step instead, once for each such step:
        :meth:`settle_hold` says that it was.
        """
        return self._owed_holds > 0

    def settle_hold(self) -> None:
        """The schedule is held back at the coming step, for one that was dropped."""
        self._owed_holds = max(0, self._owed_holds - 1)

    # -- around each step ------------------------------------------------------------------------

    def before_step(
        self, loss: Tensor | float | None = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Measure, and hold the coming ``optimizer.step()`` to its bounds.

        Call it after the backward pass and before the step. An error inside the guard never
        reaches the caller: it is logged once and the guard turns itself off.

        Args:
            loss: Scalar loss of this step; ``None`` if there is none, and then nothing that needs
                the progress of the loss is found or done.
            scaler: The gradient scaler in use, if any; it drops non-finite steps itself.
        """
        if self.active:
            with self._containment():
                self._before_step(loss, scaler)
        elif self._agreement.owes:
            with self._containment():
                self._keep_company()
        elif self._agreement.replicas_differ and not self._sharded:
            with self._containment():
                self._agreement.make_equal(self._optimizer)

    @property
    def needs_origin(self) -> bool:
        """Whether the step under way is not finite, and it has not been told where that began.

        ``False`` for a fused optimizer, whose steps are known to the host later only, and where a
        scaler looks for its scale.
        """
        if self._current is None or not self._current.lacks_origin:
            return False
        known = (f for f in self.findings if f.pathology is Pathology.NON_FINITE)
        return all(finding.until is not None for finding in known)

    def explain(self, origin: NonFiniteOrigin) -> None:
        """Tell where the step under way was first not finite, for the finding about it."""
        if self._current is not None:
            self._current.explain(origin)

    def pause(self) -> None:
        """Do not watch forward and backward passes until :meth:`resume`."""
        self._samplers.pause()
        self._vanishing.pause()

    def resume(self) -> None:
        """Watch them again."""
        self._samplers.resume()
        self._vanishing.resume()

    def discard(self) -> None:
        """Forget what forward and backward passes since the last step have shown."""
        self._samplers.discard()
        self._vanishing.discard()

    @property
    def watched_in_time(self) -> tuple[str, ...]:
        """Paths of the modules that are watched through time."""
        return self._samplers.watched_in_time

    def _keep_company(self) -> None:
        """Take part in what the other ranks still do together, and tell them that this one is off.

        Of sharded tensors, gradients and weights are measured by all ranks together.
        """
        norms = self._watched.meter.measure() if self._sharded else None
        if norms is not None and self._watched.clipper is not None:
            self._watched.clipper.signal(norms)
        self._agreement.send_failure(self._watched.failure())
        if norms is not None and self._watched.bound is not None:
            self._watched.bound.signal(norms)

    def _before_step(
        self, loss: Tensor | float | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        self._agreement.begin()
        self._abandon()
        if not self._watched.current:
            self._watch_parameters()
            self._samplers.follow()
        scale = scaler.get_scale() if scaler is not None else 1.0
        unscaled = scaler is None or not self._fused  # else inside the kernel
        self._vanishing.add_gradient(self.step, 1.0 if unscaled else scale)
        norms = self._watched.meter.measure()
        if not unscaled:
            norms = replace(norms, values=norms.values / scale, total=norms.total / scale)
        clipper, kept = self._watched.clipper, scale if not unscaled else 1.0
        clips = clipper.signal(norms, kept) if clipper is not None else None
        head = self._agreement.reach(
            self._watched.head(norms.total, loss, broken=self._broken, signal=clips)
        )
        if not any(norms.present):  # what was said is not heard, and is said again
            return
        self._broken = False
        self.last_norms, self.last_norms_step = norms, self.step
        seen = self._samplers.before_step(self.step, norms, scale, unscaled=unscaled)
        if self._put_back_now:  # a level that the weights have left is not held against these
            self._put_back_now, seen = False, replace(seen, new_phase=True)
        self._pipeline.follow(self.step, self._samplers.rates)
        outcome = Outcome(
            self.step,
            self._pipeline.plan,
            loss=None if loss is None else math.nan,
            left_to_scaler=scaler is not None,
        )
        self.step += 1
        self._pipeline.tensors = self._watched.movable
        self._current = step = Step(outcome, lambda: norms.parameters, self._watched.bound, seen)
        step.clipper, step.clip_size = clipper, 0 if clipper is None else clipper.size
        signal = self._watched.bound.signal(norms) if self._watched.bound is not None else None
        act = self._act_on_device if self._fused and scaler is None else self._act_on_host
        coefficient, early = act(
            step, head if signal is None else torch.cat([head, signal.to(head)])
        )
        if clipper is not None:  # for the cap, which is on each tensor
            coefficient = clipper.factors
        if self.active and self._keeper is not None:
            self._copy_weights(self._keeper, step)
        if self.active and self._pipeline.ladder is not None and not step.dropped:
            self._vanishing.before_step(inspecting=self._samplers.inspecting)
            self._rate.apply(outcome.plan.lr_scale)
            if self._watched.bound is not None:
                self._watched.bound.before_step(outcome.plan.max_ratio, coefficient, early)

    def _act_on_host(self, step: Step, values: Tensor) -> tuple[float, list[float]]:
        """Decide from values read now: the one host read of a healthy step."""
        total, loss, broken, failed, *signal = values.tolist()
        clips, signal = signal[: step.clip_size], signal[step.clip_size :]
        coefficient = 1.0
        if failed > 0:
            self._agreement.learn_of_failure()
            self._turn_off("the guard failed on another rank")
            return coefficient, signal
        # A scaler finds and drops steps that are not finite by itself.
        theirs = step.outcome.left_to_scaler and not math.isfinite(total)
        if self._pipeline.ladder is not None and not theirs:
            plan = step.outcome.plan
            if self._fused:  # its scaler has yet to look at the gradients, and they must be there
                plan = replace(plan, may_skip=False)
            coefficient = apply_on_host(
                plan, total, self._watched.meter.parameters, step.clipper, clips
            )
        step.outcome = replace(
            step.outcome.seen(total, loss, coefficient, step.segment_norms(clips)),
            weights_broken=broken > 0,
        )
        return coefficient, signal

    def _act_on_device(self, step: Step, values: Tensor) -> tuple[Tensor, list[float]]:
        """Decide on the device; the host reads of it ``DEVICE_DELAY`` steps later."""
        if self._pipeline.ladder is not None:
            clips = values[4 : 4 + step.clip_size] if step.clip_size else None
            coefficient = self._controls.apply(step.outcome.plan, values[0], step.clipper, clips)
        else:
            coefficient = self._watched.one
        step.on_device = (coefficient.view(1).to(values), values)
        signal, self._late_signal = self._late_signal, []
        return coefficient, signal

    def _post_step_hook(self, *_: object) -> None:
        if self.active and self._current is not None:
            with self._containment():
                self._after_step(self._current)

    def _after_step(self, step: Step) -> None:
        self._current = None
        self._release()
        capped: int | Tensor = 0
        large: int | Tensor = 0
        if self._watched.bound is not None and not step.dropped:
            capped, large = self._watched.bound.after_step(), self._watched.bound.large
        if not step.dropped:
            self._vanishing.after_step(step.outcome.plan.max_ratio)
        # Only now, as the cap takes back a part of what the optimizer has done.
        inspection = self._samplers.after_step(step.outcome.number, step.left_out)
        if inspection is not None:
            step.seen = replace(step.seen, inspection=inspection)
        if not isinstance(capped, Tensor) and not isinstance(large, Tensor):
            if capped or large:
                step.outcome = replace(step.outcome, capped=capped, large=large)
            capped = large = self._watched.zero
        if step.on_device is None:
            if capped is not self._watched.zero:
                step.outcome = replace(step.outcome, capped=int(capped), large=int(large))
            self._take(step, step.outcome)
            return
        like = step.on_device[1]
        counts = [
            n.view(1).to(like) if isinstance(n, Tensor) else like.new_full((1,), n)
            for n in (capped, large)
        ]
        for late, values in self._late.push(step, torch.cat([*counts, *step.on_device])):
            self._take_late(late, values)

    def _take_late(self, step: Step, values: list[float]) -> None:
        """Account for a step that was decided on the device some steps ago."""
        capped, large, coefficient, total, loss, broken, failed, *signal = values
        clips, signal = signal[: step.clip_size], signal[step.clip_size :]
        if step.clipper is not self._watched.clipper:
            step.clipper = None
        if step.bound is self._watched.bound:  # else a group was added since
            self._late_signal = signal
        if failed > 0:
            self._agreement.learn_of_failure()
            self._turn_off("the guard failed on another rank")
            return
        outcome = step.outcome.seen(total, loss, coefficient, step.segment_norms(clips))
        if (capped or large) and coefficient > 0.0:  # else there was no update to hold back
            outcome = replace(outcome, capped=int(capped), large=int(large))
        self._owed_holds += coefficient == 0.0
        self._take(step, replace(outcome, weights_broken=broken > 0))

    def _take(self, step: Step, outcome: Outcome) -> None:
        if self._keeper is not None:
            outcome = self._look_at_weights(self._keeper, outcome)
            self._pipeline.restorable = self._keeper.step
        self._pipeline.take(outcome, step.norms, step.seen)
        if self._pipeline.wants_exact:
            self._samplers.want_exact(outcome.number)
        known = self.recorder.findings, step.seen.inspection
        for action in self._vanishing.observe(self.step, *known):
            self.recorder.action(action)
        ladder = self._pipeline.ladder
        if self._keeper is not None and ladder is not None and ladder.puts_back:
            self._put_back(self._keeper, ladder)

    # -- earlier weights -------------------------------------------------------------------------

    def _make_keeper(
        self, rollback: WeightRollback | None, trained_elsewhere: Collection[nn.Parameter]
    ) -> WeightKeeper | None:
        if rollback is None:
            return None
        alone, silent = self._agreement.alone, self.recorder.silent
        return WeightKeeper(
            self._model,
            self._optimizer,
            rollback,
            trained_elsewhere=trained_elsewhere,
            alone=alone,
            silent=silent,
        )

    def _copy_weights(self, keeper: WeightKeeper, step: Step) -> None:
        """Before the update, if a copy is due and the step is not known to be a bad one."""
        number = step.outcome.number
        known = step.on_device is None
        if known and number > 0 and not step.outcome.finite:
            return
        newest = keeper.newest
        if newest is not None and number - newest <= self._agreement.lag:
            return  # or a rank that holds a bad copy would keep others than the rest
        if keeper.active and self._pipeline.copy_due(number, newest):
            kept = keeper.take(number)
            if not kept and self._pipeline.ladder is not None:
                self._pipeline.ladder.lose_copies()

    def _look_at_weights(self, keeper: WeightKeeper, outcome: Outcome) -> Outcome:
        """Say with the outcome whether weights were found to be broken.

        With several ranks each tells the others what it found at its next step, and all of them
        take it in with that one.
        """
        ladder = self._pipeline.ladder
        if ladder is None or ladder.rollback is None:
            return outcome
        look = ladder.rollback.looks(good=outcome.finite and outcome.coefficient > 0.0)
        damaged = keeper.finds_damage(outcome.number, look=look)
        if not self._agreement.alone:
            self._broken |= damaged
            return outcome
        return replace(outcome, weights_broken=True) if damaged else outcome

    def _put_back(self, keeper: WeightKeeper, ladder: Ladder) -> None:
        """Put earlier weights back, and forget what is known of those that are gone."""
        keeper.restore()
        ladder.puts_back = False
        if ladder.rollback is not None:
            ladder.rollback.resume_at(self.step)
        self._watched.renew_bound()
        self._late_signal = []
        self._broken = False
        self._put_back_now = True

    def _abandon(self) -> None:
        """A step that was announced but never reached its update.

        Either a scaler dropped it, or an exception came between; then there was no such step.
        """
        step, self._current = self._current, None
        if step is not None:
            self._release()
            if step.outcome.left_to_scaler:
                self._take(step, step.outcome)
            else:
                self.step = step.outcome.number

    def _watch_parameters(self) -> None:
        self._watched = WatchedParameters(
            self._model, self._optimizer, self._cap, on_device=self._fused, clip=self._clip
        )
        if self._pipeline.ladder is not None:
            self._pipeline.ladder.follow_parameters(
                self._watched.segments, compounding=self._watched.compounding
            )
        self._pipeline.loss_sign = loss_sign(self._optimizer)
        self._vanishing.follow(self._watched.meter.names, self._watched.meter.parameters)
        self._pipeline.model = replace(
            model_facts(self._model, self._optimizer),
            precision=self._precision,
            optimizers=self._optimizers,
            guarded=self.mode == "protect",
            planned_steps=self._planned_steps,
        )
        self._late_signal = []

    # -- failure and end -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _containment(self) -> Iterator[None]:
        """An error of the guard's own must not end the run that it is there to save."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
            self._turn_off(f"an internal error ({type(error).__name__}: {error})", error)

    def _turn_off(self, reason: str, error: Exception | None = None) -> None:
        self.abort()
        logger.error(
            "GradGuard is off from step %d on because of %s; training goes on unguarded.",
            self.step,
            reason,
            exc_info=error,
        )
        if error is not None:
            self._agreement.fail(self._watched.failure())

    def _release(self) -> None:
        """Put back what was set on the optimizer for one step."""
        self._rate.restore()
        self._controls.restore()

    def fail(self) -> None:
        """Take everything off because of an error around the engine, and tell the other ranks."""
        if self.active:
            self.abort()
            self._agreement.fail(self._watched.failure())

    def abort(self) -> None:
        """Take everything off the optimizer at once, whatever state the guard is in."""
        self.active = False
        self._current = self._keeper = None
        self._release()
        self._hook.remove()
        self._samplers.close()
        self._vanishing.close()
        if not self._sharded:
            self._watched.bound = (
                None  # it may hold copies of weights, which the run may need room for
            )

    def close(self) -> None:
        """Take everything off the optimizer; the engine can still be asked what happened."""
        if not self.active:
            return
        self._abandon()
        for late, values in self._late.drain():
            self._take_late(late, values)
        self._late.refill([])
        self.recorder.time(self._samplers.drain())
        self.abort()

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues exactly."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "pipeline": self._pipeline.state_dict(),
            "bound": self._watched.bound.state_dict() if self._watched.bound is not None else None,
            "late_signal": list(self._late_signal),
            "late": [step.to_dict(values) for step, values in self._late.drain()],
            "tensors": len(self._watched.meter.names),
            "clipper": self._clipper_state(),
            "put_back_now": self._put_back_now,
            "owed_holds": self._owed_holds,
            "samplers": self._samplers.state_dict(),
            "vanishing": self._vanishing.state_dict(),
        }

    def _clipper_state(self) -> dict[str, Any] | None:
        clipper = self._watched.clipper
        if clipper is None:
            return None
        return {"strategy": strategy_of(self._clip), **clipper.state_dict()}

    def _load_clipper(self, state: Mapping[str, Any] | None) -> GradientClipper | None:
        """The clipper, if it is of the strategy that was saved, going on from there."""
        clipper = self._watched.clipper
        if clipper is None or state is None or state["strategy"] != strategy_of(self._clip):
            return None
        clipper.load_state_dict(state)
        return clipper

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; from one of another version only the count of steps."""
        self.step = int(state["step"])
        self.recorder.resume(self.step)
        if state.get("version") != STATE_VERSION:
            logger.warning("GradGuard starts afresh: the checkpoint is of another version of it.")
            return
        self._pipeline.load_state_dict(state["pipeline"])
        same = state["tensors"] == len(self._watched.meter.names)
        bound = self._watched.bound if same else None
        clipper = self._load_clipper(state.get("clipper")) if same else None
        self._late.refill([Step.from_dict(entry, bound, clipper) for entry in state["late"]])
        self._late_signal = list(state["late_signal"]) if same else []
        self._put_back_now = bool(state.get("put_back_now", False))
        self._owed_holds = int(state.get("owed_holds", 0))
        if bound is not None and state["bound"] is not None:
            bound.load_state_dict(state["bound"])
        self._samplers.load_state_dict(state["samplers"], self.step)
        self._vanishing.load_state_dict(state.get("vanishing", {}), self.step)


_DEFAULTS: dict[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(GuardEngine).parameters.items()
}
