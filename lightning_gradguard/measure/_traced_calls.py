"""Calls of modules that note their states while they run: those of ``lightning_gradguard.nn``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.measure._call_shape import CallShape
from lightning_gradguard.measure._recurrent_calls import RecurrentCall, RecurrentWatch
from lightning_gradguard.measure._taps import Switch, listen
from lightning_gradguard.measure._traced_adjoint import traced_adjoint
from lightning_gradguard.measure._traced_causes import traced_causes
from lightning_gradguard.measure.adjoint import RecurrentAdjoint
from lightning_gradguard.nn._scan import Gradients, Trace

# Numbers in the states of all timesteps, whose gradients are held at once.
_MOST_STATES = 2**25


def records(module: nn.Module) -> TypeGuard[Any]:
    """Whether ``module`` notes its states in its ``recording``, and is not torch's own kernel."""
    return hasattr(module, "recording") and not getattr(module, "runs_fused", False)


class TracedCall(RecurrentCall):
    """One call, with the adjoint of all its states if the measurement was on.

    Attributes:
        traced: Whether its states were noted.
        adjoint: From when the gradient has arrived on.
        refusal: Why there is none.
    """

    def __init__(self, watch: TracedWatch, number: int, shape: CallShape, *, traced: bool) -> None:
        super().__init__(watch, number, shape, None)
        self.traced = traced
        self.adjoint: RecurrentAdjoint | None = None
        self._passes = 0
        self.refusal = "no gradient of its output arrived"

    @property
    def exact(self) -> bool:
        """Whether the exact measurement was on."""
        return self.traced

    def forget(self) -> None:
        """Let go of all copies, as the graph may live on."""
        super().forget()
        self.adjoint = None

    def arrived(self, trace: Trace, gradients: Gradients) -> None:
        """All gradients of what the module returned, before its own backward pass begins."""
        if not self._keep():
            return
        self._passes += 1
        states = sum(t.numel() for step in trace.steps for t in (*step.passed, *step.given))
        if self._passes > 1:
            self.adjoint, self.refusal = None, "its graph was gone back through more than once"
        elif torch.is_grad_enabled():
            self.refusal = "the backward pass made a graph of its own"
        elif not trace.steps:
            self.refusal = "its weights are parametrized: reading them once more may change them"
        elif states > _MOST_STATES:
            self.refusal = f"its states hold {states:,} numbers, too many to keep their gradients"
        else:
            has_cell = "c" in self._watch.module.state_names
            adjoint = traced_adjoint(trace, gradients, has_cell=has_cell)
            causes = traced_causes(self._watch.module, trace)
            self.adjoint = replace(adjoint, causes=causes)


class TracedWatch(RecurrentWatch):
    """Sees the calls of one such module; see :class:`CallWatch`."""

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See the input, let the module have a view of it, and have its states noted."""
        given = super().before(module, args, kwargs)
        call = getattr(self._begun, "call", None)
        recording: Any = module
        recording.recording = None
        if isinstance(call, TracedCall) and call.traced:
            recording.recording = Trace(_told(call, self._switch))
        return given

    def _new_call(self, shape: CallShape, data: Tensor, hx: object) -> RecurrentCall:
        return TracedCall(self, self._number, shape, traced=self._switch.exact)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """See the output and the last states."""
        call = self._take_begun()
        if call is None or not isinstance(output, tuple) or len(output) < 2:
            return
        value, states = output[:2]
        data = value.data if isinstance(value, PackedSequence) else value
        listen(data, call.output_arrived, self._switch)
        known = states if isinstance(states, tuple) else (states,)
        arrivals = (call.hidden_arrived, call.cell_arrived)
        for state, arrived in zip(known, arrivals, strict=False):  # others are no states of units
            listen(state, arrived, self._switch)


def _told(call: TracedCall, switch: Switch) -> Callable[[Trace, Gradients], None]:
    def arrived(trace: Trace, gradients: Gradients) -> None:
        if switch.watching:  # else it was meant for a forward pass that failed
            switch.run(call.arrived, trace, gradients)

    return arrived
