"""How the gradient travels through time in the modules of an unmodified model.

Example:
    >>> model = nn.LSTM(4, 16)
    >>> with TimestepProbe(model) as probe:
    ...     output, _ = model(torch.randn(50, 8, 4))
    ...     output[-1].sum().backward()
    ...     (reading,) = probe.measure()
    >>> reading.name, reading.source, reading.timesteps
    ('LSTM/l0', 'exact', 50)
    >>> reading.decay_rate < 0  # the gradient vanishes on its way back
    True
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Literal

import torch
from torch import nn

from lightning_gradguard.measure._cell_readings import cell_drafts
from lightning_gradguard.measure._cells import CellWatch
from lightning_gradguard.measure._drafts import Draft, Snapshot
from lightning_gradguard.measure._outputs import OutputWatch
from lightning_gradguard.measure._recurrent_calls import RecurrentWatch
from lightning_gradguard.measure._recurrent_readings import recurrent_drafts
from lightning_gradguard.measure._taps import Switch
from lightning_gradguard.measure._time_modules import TimeModule, find_time_modules
from lightning_gradguard.measure._traced_calls import TracedWatch
from lightning_gradguard.readings import TimeReading

__all__ = ["Snapshot", "TimestepProbe"]

_Watch = RecurrentWatch | CellWatch | OutputWatch


class TimestepProbe:
    """Measures the gradient at each timestep of the recurrent modules and attention of a model.

    The model is not changed: hooks watch its modules until :meth:`close`. On every backward pass
    fused modules (``nn.RNN``, ``nn.LSTM``, ``nn.GRU``) leave the gradient norms of their input at
    each timestep; if :attr:`exact` was on during the forward pass, also what the exact gradient of
    every state in every layer and direction follows from. Cells in a loop (``nn.LSTMCell``, …) are
    measured only then; a call that is given the state that another returned is the next timestep
    of its sequence. Everything else is watched on its output.

    What a module is not called for in training is not measured: ``no_grad``, graphs of
    ``torch.compile`` (which leave fused recurrent modules out), TorchScript. Of several calls of a
    module in one step the first 8 are measured, together. For the exact measurement copies of at
    most 16 sequences are kept, fewer of long ones, and all where dropout between layers has to be
    replayed. While it watches, ``torch.jit.script(model)`` fails; script
    ``copy.deepcopy(model)``: copies are without its hooks.

    Args:
        model: The model.
        modules: ``"auto"`` finds recurrent modules and cells, and of attention the outermost
            ``nn.TransformerEncoder``, ``nn.TransformerEncoderLayer`` or ``nn.MultiheadAttention``.
            Or names of such modules, or patterns (``"encoder.*"``). Or a mapping of names or
            patterns of any modules to the time axis of their output, of which the first other axis
            counts as the batch.
        parameters: Watch only modules that own one of these, as those of one optimizer; default
            all that have a parameter that requires grad.
        on_error: Told of an error inside a hook, which then lets the user's forward or backward
            pass go on; default: the error is raised there.

    Attributes:
        names: Paths of the watched modules. A shared module is watched once, under its first name;
            the model itself goes by the name of its type.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name matches no module, or one whose time axis is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Literal["auto"] | Sequence[str] | Mapping[str, int] = "auto",
        *,
        parameters: Collection[nn.Parameter] | None = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        found, self._unwatched = find_time_modules(model, modules, parameters)
        self._switch = Switch(on_error=on_error)
        self._watches = [_watch(module, self._switch) for module in found]
        self._collected = False
        self.names: tuple[str, ...] = tuple(watch.name for watch in self._watches)
        for watch in self._watches:
            watch.attach()

    @property
    def exact(self) -> bool:
        """Whether the coming forward passes are captured for the exact measurement.

        Default ``True``. Turn it off on the steps that should cost next to nothing.
        """
        return self._switch.exact

    @exact.setter
    def exact(self, value: bool) -> None:
        self._switch.exact = value

    @property
    def watching(self) -> bool:
        """Whether the coming forward passes are watched at all.

        Default ``True``. Turn it off on steps whose measurement would be discarded.
        """
        return self._switch.watching

    @watching.setter
    def watching(self, value: bool) -> None:
        self._switch.watching = value

    @property
    def unwatched(self) -> dict[str, str]:
        """Modules that cannot be watched, and why, in a sentence.

        Some show themselves in training only, so look again after the first measurement.
        """
        reasons = dict(self._unwatched)
        for watch in self._watches:
            if watch.reason:
                reasons[watch.name] = watch.reason
            elif self._collected and not watch.seen:
                reasons[watch.name] = (
                    f"{watch.name!r} was not seen in training so far: it is not used, or it runs "
                    "without gradients, or inside a graph of torch.compile, where hooks cannot "
                    "measure"
                )
        return reasons

    def measure(self) -> list[TimeReading]:
        """Read what the backward passes since the last measurement have left (one host read)."""
        snapshot = self.collect()
        return snapshot.decode(snapshot.values.tolist())

    @torch.no_grad()
    def collect(self) -> Snapshot:
        """Measure what the backward passes since the last measurement have left.

        The numbers stay on the device, for a later :meth:`Snapshot.decode`. After a step without
        :attr:`exact` nothing is read on the host.
        """
        drafts: list[Draft] = []
        for watch in self._watches:
            drafts += _drafts(watch)
        snapshot = Snapshot.of(drafts)
        self._collected = True
        self.discard()
        return snapshot

    def discard(self) -> None:
        """Forget what the backward passes since the last measurement have left."""
        for watch in self._watches:
            watch.forget()

    def close(self) -> None:
        """Take the hooks off the model."""
        for watch in self._watches:
            watch.detach()
            watch.forget()

    def __enter__(self) -> TimestepProbe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _drafts(watch: _Watch) -> list[Draft]:
    if isinstance(watch, RecurrentWatch):
        return recurrent_drafts(watch)
    return cell_drafts(watch) if isinstance(watch, CellWatch) else watch.drafts()


def _watch(found: TimeModule, switch: Switch) -> _Watch:
    module = found.module
    if found.way == "traced":
        return TracedWatch(found.name, module, switch)  # type: ignore[arg-type]
    if isinstance(module, nn.RNN | nn.LSTM | nn.GRU):
        return RecurrentWatch(found.name, module, switch)
    if isinstance(module, nn.RNNCell | nn.LSTMCell | nn.GRUCell):
        return CellWatch(found.name, module, switch)
    return OutputWatch(found.name, module, found.axis, switch)
