"""Dead and saturated units, counted on the outputs of activations.

Shape suffixes: ``U`` units, ``K`` looks.

Example:
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> with torch.no_grad():
    ...     _ = model[0].bias[:2].fill_(-100.0)  # two units that no input wakes
    >>> watch = ActivationWatch(model)
    >>> watch.watching = True
    >>> _ = model(torch.randn(32, 4))
    >>> snapshot = watch.look()
    >>> (reading,) = snapshot.decode(snapshot.values.tolist())
    >>> reading.module, reading.kind, reading.units, reading.dead
    ('1', 'relu', 8, 0.25)
    >>> watch.close()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.measure._activation_counts import Counts, count, shares_of, units_of
from lightning_gradguard.measure._activation_kinds import (
    RELU,
    TANH,
    ActivationKind,
    activation_kind,
)
from lightning_gradguard.measure._producers import Producer, Producers, unit_axis
from lightning_gradguard.measure._taps import Switch, attach, is_plain
from lightning_gradguard.nn._fused import runs_fused
from lightning_gradguard.readings import ActivationReading

# Looks over which outputs are counted together.
_LOOKS = 4


@dataclass(frozen=True, eq=False)
class ActivationSnapshot:
    """What a watch has seen, still on the device.

    Attributes:
        values: (N,) all numbers; :meth:`decode` makes readings of them.
    """

    values: Tensor
    _readings: tuple[ActivationReading, ...] = field(repr=False)

    def decode(self, values: Sequence[float]) -> tuple[ActivationReading, ...]:
        """Readings from the numbers of :attr:`values`, now on the host."""
        rest = iter(values)
        return tuple(
            ActivationReading(
                r.module, r.kind, r.units, r.examples, next(rest), next(rest), next(rest)
            )
            for r in self._readings
        )


class _WatchedActivation:
    """One activation module, or a recurrent one whose output an activation is.

    A module that serves several layers (one ``self.relu`` for all) is counted for each of them.
    """

    def __init__(
        self, default: Producer, module: nn.Module, kind: ActivationKind, producers: Producers
    ) -> None:
        self.name = default.name
        self.module = module
        self.kind = kind
        self.rings: dict[str, deque[Counts]] = {}
        self._default = default
        self._producers = producers
        self._current: dict[tuple[str, int, torch.device], Counts] = {}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Count the outputs of one call."""
        if not module.training:
            return
        output = _first(output)
        value = next(iter(args), None) if self.kind.of_input else output
        if not is_plain(value) or not value.dim() or not value.numel():
            return
        source = self._default
        if not isinstance(module, nn.RNN | nn.RNNCell):
            source = self._producers.of(output) or source
        axis = unit_axis(value, source.axis)
        with torch.no_grad():
            counts = count(self.kind, self.module, value.detach(), axis)
        # By device, as nn.DataParallel calls one module in several threads.
        key = (source.name, value.shape[axis], value.device)
        before = self._current.get(key)
        self._current[key] = counts if before is None else before.add(counts)

    def end(self) -> None:
        """Let what was counted since the last time be one look."""
        joined: dict[str, dict[int, Counts]] = {}
        for (source, units, _), counts in self._current.items():
            widths = joined.setdefault(source, {})
            widths[units] = widths[units].add(counts) if units in widths else counts
        self._current = {}
        looks = {
            source if len(widths) == 1 else f"{source}[{units}]": counts
            for source, widths in joined.items()
            for units, counts in widths.items()
        }
        # What was not called is not reported from earlier looks.
        self.rings = {name: self.rings.get(name, deque(maxlen=_LOOKS)) for name in looks}
        for name, counts in looks.items():
            ring = self.rings[name]
            if ring and units_of(ring[-1]) != units_of(counts):
                ring.clear()
            ring.append(counts)

    def forget(self) -> None:
        """Drop what was counted since the last look."""
        self._current = {}

    def summaries(self) -> list[tuple[ActivationReading, Tensor]]:
        """A reading without its numbers, and these (3,), of each layer that it serves."""
        found = []
        for source, ring in self.rings.items():
            counts = ring[-1]
            for earlier in list(ring)[:-1]:
                counts = counts.add(earlier)
            # Of a module that serves one layer the user looks for its own name.
            name = self.name if len(self.rings) == 1 else source
            reading = ActivationReading(name, self.kind.name, units_of(counts), counts.examples)
            found.append((reading, shares_of(counts)))
        return found


class ActivationWatch:
    """Counts outputs of the activation modules of a model that are inactive or saturated.

    Watched are modules such as ``nn.ReLU`` and ``nn.Tanh`` (see :func:`activation_kind`; SiLU and
    its like not with ``inplace=True``), and the outputs of ``nn.RNN`` and ``nn.RNNCell``. Functions
    (``torch.relu``) cannot be seen; nor can what runs in evaluation mode, without gradients, or
    inside a graph of ``torch.compile`` or TorchScript. Modules inside an
    ``nn.TransformerEncoderLayer`` are left alone, as a hook there would turn off its fast path in
    evaluation.

    A unit is an entry of the last dimension; a channel (dimension 1) where the output has three
    dimensions or more and the input comes from a convolution or a normalization of channels; where
    that does not show, the last module with weights registered before the activation decides.

    All calls between two looks count as one look; shares rest on the last four looks. Of calls with
    more than 2^18 outputs an evenly spread part is counted.

    Args:
        model: The model.
        on_error: Told of an error inside a hook, which then lets the user's forward pass go on;
            default: the error is raised there.
    """

    def __init__(
        self, model: nn.Module, *, on_error: Callable[[Exception], None] | None = None
    ) -> None:
        self._switch = Switch(watching=False, on_error=on_error)
        producers = Producers(model)
        self._watched: list[_WatchedActivation] = []
        for default, module in producers.modules():
            kind = _kind(module)
            if kind is not None:
                self._watched.append(_WatchedActivation(default, module, kind, producers))
        self._handles: list[RemovableHandle] = []

    @property
    def watching(self) -> bool:
        """Whether the coming forward passes are counted; default ``False``.

        There are hooks on the model only while they are.
        """
        return self._switch.watching

    @watching.setter
    def watching(self, value: bool) -> None:
        if value and not self._handles:
            for watched in self._watched:
                self._handles += attach(watched.module, self._switch, after=watched.after)
        elif not value:
            for handle in self._handles:
                handle.remove()
            self._handles = []
        self._switch.watching = value

    @torch.no_grad()
    def look(self) -> ActivationSnapshot:
        """End a look; what it has shown stays on the device. No host read."""
        readings: list[ActivationReading] = []
        shares: list[Tensor] = []
        for watched in self._watched:
            watched.end()
            for reading, numbers in watched.summaries():
                readings.append(reading)
                shares.append(numbers)
        if not shares:
            return ActivationSnapshot(torch.zeros(0), ())
        device = shares[-1].device
        moved = [numbers.to(device, non_blocking=True) for numbers in shares]
        return ActivationSnapshot(torch.cat(moved), tuple(readings))

    def discard(self) -> None:
        """Forget what was counted since the last look."""
        for watched in self._watched:
            watched.forget()

    def close(self) -> None:
        """Take the hooks off the model."""
        self.watching = False
        self.discard()

    def state_dict(self) -> dict[str, Any]:
        """The counts of the last looks as plain values (a host read)."""
        return {
            watched.name: {
                source: [counts.to_list() for counts in ring]
                for source, ring in watched.rings.items()
            }
            for watched in self._watched
            if watched.rings
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved counts; activations that are not there begin afresh."""
        for watched in self._watched:
            watched.rings = {
                source: deque((Counts.from_list(look) for look in looks), maxlen=_LOOKS)
                for source, looks in state.get(watched.name, {}).items()
            }


def _kind(module: nn.Module) -> ActivationKind | None:
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if isinstance(module, nn.RNN | nn.RNNCell):
        # A leaky unit is never dead, and with a residual the output is no activation.
        return {"tanh": TANH, "relu": RELU}.get(module.nonlinearity) if runs_fused(module) else None
    kind = activation_kind(module)
    # What it is decided by must not be overwritten.
    lost = kind is not None and kind.of_input and getattr(module, "inplace", False)
    return None if lost else kind


def _first(output: Any) -> Any:
    """The output, or the first of several; of a packed sequence its data."""
    if isinstance(output, tuple | list):
        return _first(output[0]) if output else None
    return output
