"""See, understand and survive."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from typing_extensions import override

from lightning_gradguard._validation import check_choice, check_observes, check_type
from lightning_gradguard.callbacks import single
from lightning_gradguard.callbacks.asked import RUNGS
from lightning_gradguard.callbacks.base import EngineCallback
from lightning_gradguard.diagnose import Thresholds
from lightning_gradguard.incidents import Incidents
from lightning_gradguard.record import GradientAlert
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
from lightning_gradguard.respond.clipping import check_clip
from lightning_gradguard.sampling import EXACT_EVERY_N_STEPS


class GradGuard(EngineCallback):
    """Watches a run and keeps it alive: clips, caps, skips and backs off as far as needed.

    Everything adapts to the run's own history, so there is nothing to tune, and scaling the loss
    changes nothing. Besides what :class:`GradientMonitor` logs it logs what it did:
    ``grad_norm/total_clipped`` and ``gradguard/*``.

    Args:
        mode: ``"protect"`` (default), or ``"observe"`` to turn every response off.
        clip: How gradients are clipped. Default: their total norm, to ten times its running median;
            other strategies are in :mod:`lightning_gradguard.respond`; ``None`` for not at all.
        cap: Cap on each tensor's relative update. Default: one that holds once the loss has risen
            under large updates; ``UpdateCap()`` holds from the first step on; ``None`` for none.
        skip: Dropping of steps with a bad gradient; ``None`` for none.
        backoff: Cutting of the learning rate on instability; ``None`` for none.
        layer_depth: Components of the module path that make a layer in the metric keys; default
            ``None``, the whole path.
        events: Whether to append findings and actions to ``gradguard/events.jsonl`` in the run's
            log directory. Default ``True``.
        timesteps: Modules whose gradient is measured through time. Default ``"auto"``: recurrent
            modules and attention encoders, wherever they are. Also names or patterns, as in
            ``["encoder.*"]``; names with the time axis of the module's output, for modules of other
            types, as in ``{"tcn": 2}``; or ``None`` for none.
        exact_every_n_steps: Steps between exact measurements of recurrent modules. Default 300:
            each costs 0.6 to 1.6 training steps. In between, every 50 steps, the gradient of their
            input is measured, which costs less; both together take at most 1% of the run.
        preflight: Whether to measure the first batch before the first step and print a table, which
            is kept as ``preflight_result``, see :func:`lightning_gradguard.preflight`. Default
            ``False``.
        thresholds: What counts as a finding.
        alert: Who is told of what, besides the console. Default: W&B alerts where the Trainer has a
            ``WandbLogger``; ``None`` for nobody.
        vanishing: Regularizer that keeps the gradient through time from vanishing in recurrent
            modules. Default ``None``: it changes what the model is trained for.
        boost: Larger updates for the layers that get too little while the gradient vanishes through
            depth. Default ``None``.
        rollback: Going back to earlier weights when the run is lost; ``None`` for not at all. The
            copies of the weights are not part of a checkpoint.
        incidents: What is kept of steps that go wrong, in ``gradguard/incidents`` in the run's log
            directory, to be looked at again with ``gradguard replay``. Default ``True``, as
            ``Incidents()``; ``False`` for nothing.
        history: Whether to keep the numbers of the run in ``gradguard/history`` in its log
            directory, at most 50 MB of them, for reports, ``gradguard watch`` and pandas. Default
            ``True``; it needs the events, and of a Trainer without a logger a
            ``default_root_dir``.
        report: Whether to write ``gradguard/report.html`` at the end of the fit, from the history.
            Default ``True``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gradguard import GradGuard
        >>> trainer = Trainer(callbacks=[GradGuard()], logger=False, enable_checkpointing=False)
    """

    precedence = 0

    def __init__(
        self,
        mode: Literal["protect", "observe"] = "protect",
        clip: ClipStrategy | single.AdaptiveGradientClipping | None = AdaptiveClip(),
        cap: UpdateCap | single.UpdateCap | None = UpdateCap(on_evidence=True),
        skip: SkipBadSteps | single.SkipBadSteps | None = SkipBadSteps(),
        backoff: LearningRateBackoff | single.LearningRateBackoff | None = LearningRateBackoff(),
        layer_depth: int | None = None,
        events: bool = True,
        timesteps: Literal["auto"] | list[str] | dict[str, int] | None = "auto",
        exact_every_n_steps: int = EXACT_EVERY_N_STEPS,
        preflight: bool = False,
        thresholds: Thresholds = Thresholds(),
        alert: GradientAlert | single.GradientAlert | None = GradientAlert(),
        vanishing: VanishingRegularizer | None = None,
        boost: LayerBoost | None = None,
        rollback: WeightRollback | single.WeightRollback | None = WeightRollback(),
        incidents: Incidents | bool = True,
        history: bool = True,
        report: bool = True,
    ) -> None:
        super().__init__(
            layer_depth,
            events=events,
            timesteps=timesteps,
            exact_every_n_steps=exact_every_n_steps,
            preflight=preflight,
            thresholds=thresholds,
            incidents=incidents,
            history=history,
            report=report,
        )
        check_choice("mode", mode, ("protect", "observe"))
        self.mode = mode
        self.clip = single.settings_of(clip)
        self.cap = single.settings_of(cap)
        self.skip = single.settings_of(skip)
        self.backoff = single.settings_of(backoff)
        self.rollback = single.settings_of(rollback)
        self.vanishing = vanishing
        self.boost = boost
        self.alert = single.settings_of(alert)
        check_clip(self.clip)
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            check_type(name, value, (kind, type(None)), f"a {kind.__name__} or None")
        check_observes(mode, {name: getattr(self, name) for name in RUNGS}, _DEFAULTS)

    def _chosen(self, name: str) -> bool:
        """Whether the user has asked for other than the default."""
        return bool(getattr(self, name) != _DEFAULTS[name])

    @override
    def asks(self) -> Mapping[str, Any]:
        names = ("alert",) if self.mode == "observe" else (*RUNGS, "alert")
        return {name: getattr(self, name) for name in names if self._chosen(name)}

    @override
    def offers(self) -> Mapping[str, Any]:
        return {"alert": _DEFAULTS["alert"]} if self.mode == "observe" else _DEFAULTS


_KINDS: dict[str, type] = {
    "cap": UpdateCap,
    "skip": SkipBadSteps,
    "backoff": LearningRateBackoff,
    "rollback": WeightRollback,
    "vanishing": VanishingRegularizer,
    "boost": LayerBoost,
    "alert": GradientAlert,
}
_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(GradGuard).parameters.items()
    if name in (*RUNGS, "alert")
}
