"""One response each, for who wants no more; together on a Trainer they are one guard.

Each class has the name and the arguments of the settings in :mod:`lightning_gradguard.respond` or
:mod:`lightning_gradguard.record` that it holds, and stands for them in ``GradGuard(...)`` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from lightning_gradguard import record, respond
from lightning_gradguard.callbacks.base import EngineCallback
from lightning_gradguard.record.alert import Alert, Level
from lightning_gradguard.respond.clipping import check_clip
from lightning_gradguard.sampling import EXACT_EVERY_N_STEPS


class SingleResponse(EngineCallback):
    """Asks for one response.

    Findings, metrics, events and the history come with it; batches of bad steps are not kept, and
    the report is left to ``gradguard report``.

    Args:
        kind: Which response, as ``GradGuard`` names it.
        settings: Its settings.
    """

    def __init__(self, kind: str, settings: object) -> None:
        super().__init__(
            None,
            events=True,
            timesteps="auto",
            exact_every_n_steps=EXACT_EVERY_N_STEPS,
            preflight=False,
            incidents=False,
            report=False,
        )
        self.kind = kind
        self.settings = settings

    @override
    def asks(self) -> Mapping[str, Any]:
        return {self.kind: self.settings}


class AdaptiveGradientClipping(SingleResponse):
    """Clips gradients, by default their total norm to ten times its own running median.

    Args:
        strategy: One of the strategies in :mod:`lightning_gradguard.respond`.

    Raises:
        TypeError: If ``strategy`` is none of them.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gradguard import AdaptiveGradientClipping
        >>> from lightning_gradguard.respond import PercentileClip
        >>> clipping = AdaptiveGradientClipping(PercentileClip(percentile=10))
        >>> trainer = Trainer(callbacks=[clipping], logger=False, enable_checkpointing=False)
    """

    def __init__(self, strategy: respond.ClipStrategy = respond.AdaptiveClip()) -> None:
        check_clip(strategy)
        if strategy is None:
            raise TypeError("strategy must be a clipping strategy, got None")
        super().__init__("clip", strategy)


class UpdateCap(SingleResponse):
    """Lets no tensor move by more than a share of its own norm in one step.

    Args:
        max_ratio: See :class:`lightning_gradguard.respond.UpdateCap`, as for all arguments.
        wide_ratio: The widest share while the learning rate is no ordinary one.
        start_ratio: The share at the start.
        min_ratio: The tightest share.
        adaptive: Whether the share follows the loss.
        window: Steps between the first looks at the loss.
        opening: Factor on the share while it has never been tightened.
        tighten: Factor on it when the loss does not improve.
        retreat: Factor on it when the loss gets worse.
        loosen: Factor on it otherwise.
        confidence: The change of the loss that counts, in standard errors.
        relu_recurrence: Factor on the share for the recurrent weights of ReLU RNNs.
        on_evidence: Whether nothing is bounded until the loss speaks against it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard import GradGuard, SkipBadSteps, UpdateCap
        >>> callbacks = [UpdateCap(max_ratio=0.05), SkipBadSteps()]
        >>> guard = GradGuard(cap=UpdateCap(max_ratio=0.05))  # all else as it is
    """

    def __init__(
        self,
        max_ratio: float = respond.UpdateCap.max_ratio,
        wide_ratio: float | None = respond.UpdateCap.wide_ratio,
        start_ratio: float | None = respond.UpdateCap.start_ratio,
        min_ratio: float | None = respond.UpdateCap.min_ratio,
        adaptive: bool = respond.UpdateCap.adaptive,
        window: int = respond.UpdateCap.window,
        opening: float = respond.UpdateCap.opening,
        tighten: float = respond.UpdateCap.tighten,
        retreat: float = respond.UpdateCap.retreat,
        loosen: float = respond.UpdateCap.loosen,
        confidence: float = respond.UpdateCap.confidence,
        relu_recurrence: float = respond.UpdateCap.relu_recurrence,
        on_evidence: bool = respond.UpdateCap.on_evidence,
    ) -> None:
        settings = respond.UpdateCap(
            max_ratio=max_ratio,
            wide_ratio=wide_ratio,
            start_ratio=start_ratio,
            min_ratio=min_ratio,
            adaptive=adaptive,
            window=window,
            opening=opening,
            tighten=tighten,
            retreat=retreat,
            loosen=loosen,
            confidence=confidence,
            relu_recurrence=relu_recurrence,
            on_evidence=on_evidence,
        )
        super().__init__("cap", settings)


class SkipBadSteps(SingleResponse):
    """Drops steps whose gradient is not finite, or far beyond the usual.

    Args:
        outlier_factor: See :class:`lightning_gradguard.respond.SkipBadSteps`, as for all arguments.
        max_consecutive: Budget of skips in a row.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard import SkipBadSteps
        >>> SkipBadSteps(max_consecutive=-1)
        Traceback (most recent call last):
        ...
        ValueError: max_consecutive must be an integer >= 1, got -1
    """

    def __init__(
        self,
        outlier_factor: float = respond.SkipBadSteps.outlier_factor,
        max_consecutive: int = respond.SkipBadSteps.max_consecutive,
    ) -> None:
        super().__init__("skip", respond.SkipBadSteps(outlier_factor, max_consecutive))


class LearningRateBackoff(SingleResponse):
    """Cuts the effective learning rate on instability, and recovers it step by step.

    Args:
        factor: See :class:`lightning_gradguard.respond.LearningRateBackoff`, as for all arguments.
        min_scale: The rate is never cut below this share of the schedule's.
        cooldown_steps: Steps to wait after a cut before the next one.
        recovery_steps: Healthy steps after which a cut is half undone.
        max_leap: How far beyond its highest value the schedule's own rate may rise in one step.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard import LearningRateBackoff
        >>> LearningRateBackoff(factor=0.3).settings.min_scale
        0.015625
    """

    def __init__(
        self,
        factor: float = respond.LearningRateBackoff.factor,
        min_scale: float = respond.LearningRateBackoff.min_scale,
        cooldown_steps: int = respond.LearningRateBackoff.cooldown_steps,
        recovery_steps: int = respond.LearningRateBackoff.recovery_steps,
        max_leap: float = respond.LearningRateBackoff.max_leap,
    ) -> None:
        settings = respond.LearningRateBackoff(
            factor, min_scale, cooldown_steps, recovery_steps, max_leap
        )
        super().__init__("backoff", settings)


class WeightRollback(SingleResponse):
    """Puts healthy weights back when a run is lost.

    Args:
        every_n_steps: See :class:`lightning_gradguard.respond.WeightRollback`, as for all
            arguments.
        max_rollbacks: Times that weights are put back in a run.
        max_bytes: Host memory that the two copies may take together.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard import WeightRollback
        >>> WeightRollback(every_n_steps=200).settings.max_rollbacks
        3
    """

    def __init__(
        self,
        every_n_steps: int = respond.WeightRollback.every_n_steps,
        max_rollbacks: int = respond.WeightRollback.max_rollbacks,
        max_bytes: int = respond.WeightRollback.max_bytes,
    ) -> None:
        settings = respond.WeightRollback(every_n_steps, max_rollbacks, max_bytes)
        super().__init__("rollback", settings)


class GradientAlert(SingleResponse):
    """Tells people: a W&B alert, a line in a log, any callable; throttled, and never in the way.

    Args:
        send: See :class:`lightning_gradguard.record.GradientAlert`, as for all arguments.
        min_severity: The least severity of a finding that is told.
        actions: Kinds of actions that are told.
        wandb: Whether W&B is told where the Trainer has a ``WandbLogger``.
        log: Whether Python's logger ``lightning_gradguard.alerts`` is told.
        every_seconds: Least time between two alerts of one title.
        max_alerts: Alerts in a run.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gradguard import GradientAlert
        >>> alert = GradientAlert(send=print, min_severity="critical")
        >>> trainer = Trainer(callbacks=[alert], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        send: Callable[[Alert], object] | None = record.GradientAlert.send,
        min_severity: Level = record.GradientAlert.min_severity,
        actions: tuple[str, ...] = record.GradientAlert.actions,
        wandb: bool = record.GradientAlert.wandb,
        log: bool = record.GradientAlert.log,
        every_seconds: float = record.GradientAlert.every_seconds,
        max_alerts: int = record.GradientAlert.max_alerts,
    ) -> None:
        settings = record.GradientAlert(
            send=send,
            min_severity=min_severity,
            actions=actions,
            wandb=wandb,
            log=log,
            every_seconds=every_seconds,
            max_alerts=max_alerts,
        )
        super().__init__("alert", settings)


def settings_of(response: Any) -> Any:
    """The settings that a callback stands for; anything else is returned as it is."""
    return response.settings if isinstance(response, SingleResponse) else response
