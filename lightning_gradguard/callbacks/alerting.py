"""Connect what a run records with the people it has, as far as the Trainer knows them."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Trainer

from lightning_gradguard.record import (
    AlertSender,
    GradientAlert,
    Recorder,
    channels_of,
    wandb_runs,
)


def start_alerts(
    settings: GradientAlert | None, trainer: Trainer, recorders: Iterable[Recorder]
) -> AlertSender | None:
    """Tell people from now on of what the recorders hear, until the sender is closed.

    Only the first rank does, and a trial run (``fast_dev_run``) alerts nobody.

    Args:
        settings: Who is told of what; ``None`` for nobody.
        trainer: Training has started, so that its loggers have begun their runs.
        recorders: One for each optimizer.

    Returns:
        What delivers the alerts; ``None`` where there is nobody to tell.
    """
    trial_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set late
    if settings is None or trial_run or not trainer.is_global_zero:
        return None
    channels = channels_of(settings, wandb_runs(trainer.loggers) if settings.wandb else ())
    if not channels:
        return None
    sender = AlertSender(settings, channels)
    for recorder in recorders:
        sender.listen(recorder)
    return sender
