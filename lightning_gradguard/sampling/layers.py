"""When to look at every layer, and when what was seen is on the host."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard._validation import check_number
from lightning_gradguard.measure.inspection import InspectionSnapshot, LayerInspector
from lightning_gradguard.measure.norms import GradNorms
from lightning_gradguard.measure.readback import PendingRead
from lightning_gradguard.readings import Inspection

logger = logging.getLogger("lightning_gradguard")

# A look costs up to a third of a step of a model of ordinary layers.
LAYERS_EVERY_N_STEPS = 50
# What a look costs beside what its numbers take is a Python loop over the tensors: of many small
# ones, whose step is no longer than that loop, it is taken more rarely.
_TENSORS_PER_INTERVAL = 250
# Many troubles show from the first step on, and a short run has no other looks.
_EARLY = frozenset({0, 1, 2, 4, 8, 16, 32, 40})


class LayerSampler:
    """Runs an inspector over the training of one optimizer.

    It looks at steps 0, 1, 2, 4, 8, 16, 32, 40 and every 50 steps, less often at models of more
    than 250 tensors. Forward passes are watched on those steps but the first; on all others there
    is no hook on the model. (``torch.compile`` would take hooks that it finds on the first step
    into its graphs, and compile again when they are gone.) If no call of a module can be seen, as
    in a graph, no hook is set any more, and all that follows from calls is left unknown.

    Call :meth:`before_step` and :meth:`after_step` around every step. A step that was announced and
    never came leaves no trace.

    Args:
        model: The model.
        optimizer: The optimizer.
        trained_elsewhere: Parameters of other optimizers of the run.
        delay: Steps until what was seen is on the host.

    Raises:
        TypeError: If ``delay`` is not an integer.
        ValueError: If ``delay`` is negative.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        trained_elsewhere: Collection[Tensor] = (),
        delay: int = 0,
    ) -> None:
        check_number("delay", delay, at_least=0, integer=True)
        self.active = True
        self._delay = delay
        self._inspector = LayerInspector(model, optimizer, trained_elsewhere, on_error=self._fail)
        self._begun: int | None = None
        self._upcoming = 0
        self._hooks_see: bool | None = None  # not known before the second step
        self._late: deque[_Late] = deque()
        self._arm()

    @property
    def every_n_steps(self) -> int:
        """Steps between looks, once the first ones are over."""
        return LAYERS_EVERY_N_STEPS * max(1, -(-len(self._inspector) // _TENSORS_PER_INTERVAL))

    def looks_at(self, step: int) -> bool:
        """Whether ``step`` is one of those that are looked at."""
        return self.active and (step in _EARLY or (step > 0 and step % self.every_n_steps == 0))

    def follow(self, optimizer: Optimizer, trained_elsewhere: Collection[Tensor] = ()) -> None:
        """Look at the parameters that ``optimizer`` has now: groups can be added at any time."""
        if self.active:
            try:
                self._begun = None
                self._inspector.follow(optimizer, trained_elsewhere)
            except Exception as error:  # noqa: BLE001 - the rest of the guard goes on
                self._fail(error)

    def pause(self) -> None:
        """See no forward pass until :meth:`resume`: those of evaluation are not meant."""
        self._inspector.watching = False

    def resume(self) -> None:
        """See the forward passes of the next step again."""
        self._arm()

    def _arm(self) -> None:
        """Prepare for the forward passes of the next step."""
        can_see = self._hooks_see or (self._hooks_see is None and self._upcoming > 0)
        self._inspector.watching = can_see and self.looks_at(self._upcoming)

    def before_step(
        self, step: int, norms: GradNorms, scale: float = 1.0, *, scaled: bool = False
    ) -> None:
        """Look at what the backward pass has left, before gradients are clipped or dropped.

        Args:
            step: The coming step.
            norms: Of the gradients of the optimizer's parameters.
            scale: What the loss was multiplied by in the backward pass, as by a gradient scaler.
            scaled: Whether gradients still are, as those of a fused optimizer with a scaler.
        """
        if not self.active:
            return
        self._begun = None
        try:
            if self.looks_at(step):
                watched = self._inspector.watching
                seen = self._inspector.before_step(norms, scale, scaled=scaled)
                if watched and any(norms.present) and not self._hooks_see:
                    self._hooks_see = seen
                self._begun = step
            elif self._inspector.watching:
                self._inspector.discard()
        except Exception as error:  # noqa: BLE001 - the rest of the guard goes on
            self._fail(error)
        self._upcoming = step + 1
        self._arm()

    def after_step(self, step: int, dropped: bool | Tensor = False) -> None:
        """Look at what the optimizer has changed.

        Args:
            step: The step that was taken.
            dropped: Whether it was left out; may be a 0-dim tensor on the device.
        """
        begun, self._begun = self._begun, None
        if not self.active or begun is None or begun != step:
            return
        try:
            snapshot = self._inspector.after_step(dropped)
            if snapshot is not None:
                self._late.append(_OnItsWay(step, snapshot))
        except Exception as error:  # noqa: BLE001 - the rest of the guard goes on
            self._fail(error)

    def take(self, step: int) -> Inspection | None:
        """The newest inspection that is due at ``step``, once."""
        newest: _Late | None = None
        while self._late and self._late[0].step + self._delay <= step:
            newest = self._late.popleft()
        if newest is None:
            return None
        try:
            return newest.inspection()
        except Exception as error:  # noqa: BLE001 - the rest of the guard goes on
            self._fail(error)
            return None

    def discard(self) -> None:
        """Forget what the forward passes since the last step have left."""
        self._begun = None
        self._inspector.discard()

    def drain(self) -> tuple[Inspection, ...]:
        """Wait for the inspections that are not due yet."""
        late, self._late = self._late, deque()
        try:
            return tuple(entry.inspection() for entry in late)
        except Exception as error:  # noqa: BLE001 - nothing else is to be lost with them
            self._fail(error)
            return ()

    def close(self) -> None:
        """Take all hooks off the model."""
        self.active = False
        self._begun = None
        self._inspector.close()

    def _fail(self, error: Exception) -> None:
        """A hook of ours must not end the forward pass that it is in."""
        if self.active:
            logger.error(
                "GradGuard stops looking at single layers because of an internal error (%s: %s); "
                "everything else goes on.",
                type(error).__name__,
                error,
                exc_info=error,
            )
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues at the same steps."""
        return {
            "hooks_see": self._hooks_see,
            "late": [entry.inspection().to_dict() for entry in self._late],
            "activations": self._inspector.activations.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from a saved state at ``step``."""
        self._hooks_see = state["hooks_see"]
        self._late = deque(_Restored(Inspection.from_dict(late)) for late in state["late"])
        self._inspector.activations.load_state_dict(state["activations"])
        self.discard()
        self._upcoming = step
        self._arm()


class _Late(Protocol):
    """An inspection that is not due yet."""

    step: int

    def inspection(self) -> Inspection:
        """Wait for it."""


class _OnItsWay:
    def __init__(self, step: int, snapshot: InspectionSnapshot) -> None:
        self.step = step
        self._snapshot = snapshot
        self._values = PendingRead(snapshot.values)

    def inspection(self) -> Inspection:
        return self._snapshot.decode(self._values.wait(), self.step)


class _Restored:
    def __init__(self, inspection: Inspection) -> None:
        self.step = inspection.step
        self._inspection = inspection

    def inspection(self) -> Inspection:
        return self._inspection
