"""Keep what goes wrong in a fit."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_gradguard.callbacks.moments import Moments
from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.guard import DEVICE_DELAY, GuardEngine
from lightning_gradguard.incidents import Incidents, IncidentWriter, Moment
from lightning_gradguard.incidents.class_paths import importable_path
from lightning_gradguard.incidents.draft import Draft
from lightning_gradguard.respond.actions import ActionKind
from lightning_gradguard.respond.apply import runs_fused

logger = logging.getLogger("lightning_gradguard")

# From which severity on a finding leaves an incident, and as what.
_WORTH = {
    Pathology.NON_FINITE: (Severity.INFO, "non_finite"),
    Pathology.DIVERGING: (Severity.WARNING, "diverging"),
    Pathology.EXPLODING: (Severity.CRITICAL, "diverging"),
}


def steps_to_remember(optimizers: Sequence[Optimizer]) -> int:
    """How many steps must be remembered until the host knows what became of the first of them."""
    return 1 + DEVICE_DELAY if any(runs_fused(optimizer) for optimizer in optimizers) else 1


def start_incidents(
    settings: Incidents | bool,
    folder: Path | None,
    moments: Moments,
    trainer: Trainer,
    module: LightningModule,
    engines: Sequence[GuardEngine],
) -> IncidentKeeper | None:
    """What keeps the incidents of a fit; ``None`` if none are to be kept.

    Args:
        settings: What the user has asked for.
        folder: The run's ``gradguard`` directory; ``None`` for none.
        moments: Knows the batches.
        trainer: The Trainer of the fit.
        module: The model.
        engines: One per optimizer.
    """
    if settings is False or folder is None or not engines:
        return None
    kept = Incidents() if settings is True else settings
    writer = IncidentWriter(folder / "incidents", kept, rank=trainer.global_rank)
    return IncidentKeeper(writer, moments, trainer, module, engines)


class IncidentKeeper:
    """Writes an incident for each serious finding when it opens, and for an exception.

    An error of its own is told once and ends nothing.

    Args:
        writer: Writes them; ``None`` for none.
        moments: Knows the batches.
        trainer: The Trainer of the fit.
        module: The model.
        engines: One per optimizer. What they have open by now comes from a resumed run, whose
            batches are gone, and is left out.
    """

    def __init__(
        self,
        writer: IncidentWriter,
        moments: Moments,
        trainer: Trainer,
        module: LightningModule,
        engines: Sequence[GuardEngine],
    ) -> None:
        self._writer: IncidentWriter | None = writer
        self._moments = moments
        self._trainer = trainer
        self._module = module
        self._engines = engines
        self._open = [_open_in(engine) for engine in engines]
        self._drafts: dict[int, Draft] = {}
        self._complained = False

    def before_update(self, number: int) -> None:
        """Take the weights of a step that is known to be not finite, as they were in it.

        Args:
            number: Which optimizer's step it is.
        """
        step, moment = self._engines[number].step - 1, self._moments.current
        if self._is_ours(moment):
            draft = self._begin(number, step, step, moment)
            if draft is not None:
                self._drafts[number] = draft

    def after_update(self) -> None:
        """Keep what the last steps have brought to light."""
        if self._writer is None:
            return
        for number, engine in enumerate(self._engines):
            before, self._open[number] = self._open[number], _open_in(engine)
            new = [finding for key, finding in self._open[number].items() if key not in before]
            draft = self._drafts.pop(number, None)
            if draft is not None:
                its = [f for f in new if f.pathology is Pathology.NON_FINITE]
                self._commit(draft, number, "non_finite", its[0] if its else None)
            done = {draft.step} if draft is not None else set()
            for finding in new:
                if finding.step not in done:  # one step, one incident
                    done.add(finding.step)
                    self._keep(number, finding)

    def on_exception(self, exception: BaseException) -> None:
        """Keep the batch in which a fit ends; an interruption is no incident."""
        moment = self._moments.current
        if self._writer is None or moment is None or not isinstance(exception, Exception):
            return
        if not self._drafts:
            step, weights_step = moment.steps[0], self._engines[0].step
            draft = self._begin(0, step, weights_step, moment, label="")
            if draft is not None:
                self._commit(draft, 0, "exception", None, exception)
        for number, draft in self._drafts.items():
            self._commit(draft, number, "non_finite", None, exception)
        self._drafts.clear()

    def close(self) -> None:
        """Let go of everything."""
        for draft in self._drafts.values():
            draft.discard()
        self._drafts.clear()
        self._moments.clear()
        self._writer = None

    # -- one incident ----------------------------------------------------------------------------

    def _is_ours(self, moment: Moment | None) -> bool:
        """Whether this process keeps a step that is not finite.

        The first one does, and every other whose own loss or batch is to blame: what it has got
        from others, as gradients, they keep themselves.
        """
        if self._writer is None:
            return False
        return self._writer.rank == 0 or (moment is not None and not moment.is_finite())

    def _keep(self, number: int, finding: Finding) -> None:
        """An incident of a step that is over."""
        reason = _WORTH[finding.pathology][1]
        moment = self._moments.at(number, finding.step)
        first = self._writer is not None and self._writer.rank == 0
        if not (self._is_ours(moment) if reason == "non_finite" else first):
            return
        draft = self._begin(number, finding.step, self._engines[number].step, moment)
        if draft is not None:
            self._commit(draft, number, reason, finding)

    def _begin(
        self,
        number: int,
        step: int,
        weights_step: int,
        moment: Moment | None,
        label: str | None = None,
    ) -> Draft | None:
        if self._writer is None:
            return None
        engine = self._engines[number]
        try:
            return self._writer.begin(
                step,
                self._module,
                moment,
                weights_step=weights_step,
                label=engine.recorder.label if label is None else label,
                facts={
                    **_facts(self._trainer, self._module, moment),
                    "rolled_back": weights_step > step and _rolled_back(engine, step),
                },
            )
        except Exception as error:  # noqa: BLE001 - no reason not to go on training
            self._complain(step, error)
            return None

    def _commit(
        self,
        draft: Draft,
        number: int,
        reason: str,
        finding: Finding | None,
        exception: BaseException | None = None,
    ) -> None:
        history = self._engines[number].history
        try:
            path = draft.commit(reason, finding=finding, exception=exception, history=history)
        except Exception as error:  # noqa: BLE001 - as above
            self._complain(draft.step, error)
            return
        if draft.why_not:
            again = f"cannot be replayed, because {draft.why_not}"
        else:
            name = importable_path(type(self._module)) or "package.module:Class"
            command = shlex.join(["gradguard", "replay", str(path), "--module", name])
            again = f"can be looked at again with: {command}"
        logger.warning(
            "Step %d (%s) is kept as an incident in %s, which %s", draft.step, reason, path, again
        )

    def _complain(self, step: int, error: Exception) -> None:
        if not isinstance(error, ValueError):  # else there was no room, and may be later
            self._writer = None
        if not self._complained:
            self._complained = True
            logger.warning(
                "Step %d cannot be kept as an incident (%s); training goes on without.", step, error
            )


def _open_in(engine: GuardEngine) -> dict[tuple[Pathology, str, bool], Finding]:
    """Open findings that are worth an incident."""
    found = {}
    for finding in engine.recorder.findings:
        least, _ = _WORTH.get(finding.pathology, (None, ""))
        if finding.until is None and least is not None and finding.severity >= least:
            found[finding.pathology, finding.where, finding.local] = finding
    return found


def _rolled_back(engine: GuardEngine, since: int) -> bool:
    done = (action for action in engine.actions if action.kind is ActionKind.ROLL_BACK)
    return any(action.step >= since for action in done)


def _facts(trainer: Trainer, module: LightningModule, moment: Moment | None) -> dict[str, Any]:
    loss = None if moment is None else moment.loss
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
        "device": module.device.type,
        "loss": None if loss is None else float(loss),
    }
