"""Two copies of everything that an update changes, in host memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.measure.readback import PendingRead
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.measure.updates import RMS_FLOOR
from lightning_gradguard.respond.copies import (
    TensorCopy,
    all_finite,
    bytes_on_a_rank,
    copy_of,
    is_writable,
    largest_elements,
    put_back,
    tensors_in,
)

# Times the largest weight of a tensor in its copy.
_OUT_OF_SCALE = 1000.0


@dataclass
class _Snapshot:
    """One copy.

    Attributes:
        step: The step before whose update it was made.
        weights: Of each parameter of the optimizer.
        states: Of each parameter that had a state.
        buffers: By the name of its module and its own.
        finite: Whether every weight was finite; ``None`` if that needs no reading.
        arrived: For each CUDA device, when the copy is complete.
    """

    step: int
    weights: dict[Tensor, TensorCopy] = field(default_factory=dict)
    states: dict[Tensor, object] = field(default_factory=dict)
    buffers: dict[tuple[str, str], TensorCopy] = field(default_factory=dict)
    finite: PendingRead | None = None
    arrived: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)


class WeightSnapshots:
    """Copies weights, optimizer state and buffers, and puts them back in place, bit for bit.

    The newest copy is a candidate; the one before it is what :meth:`restore` puts back. Memory of
    copies that are no longer needed is used again. On CUDA a copy is made beside the training, into
    pinned memory: the host does not wait for it.

    Args:
        model: Whose buffers are copied.
        optimizer: Whose parameters and state are copied. Its groups' settings are not.
        trained_elsewhere: Parameters that other optimizers update: buffers of the modules that have
            no others are not copied, as they go with weights that stay. Default none.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        >>> snapshots = WeightSnapshots(layer, optimizer)
        >>> snapshots.take(0)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(layer.weight, before), len(optimizer.state)
        (False, 2)
        >>> snapshots.restore()
        0
        >>> torch.equal(layer.weight, before), len(optimizer.state)
        (True, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        trained_elsewhere: Collection[nn.Parameter] = (),
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._elsewhere = {id(parameter) for parameter in trained_elsewhere}
        self._confirmed: _Snapshot | None = None
        self._candidate: _Snapshot | None = None
        self._spare: _Snapshot | None = None

    @property
    def newest(self) -> int | None:
        """Step of the newest copy; ``None`` if there is none."""
        newest = self._candidate or self._confirmed
        return newest.step if newest is not None else None

    @property
    def step(self) -> int | None:
        """Step of the copy that :meth:`restore` puts back; ``None`` if there is none."""
        chosen = self._confirmed or self._candidate
        return chosen.step if chosen is not None else None

    @property
    def bytes_of_two(self) -> int:
        """Host memory that two copies of what there is now take, the same on every rank."""
        buffers = (buffer for _, _, buffer in self._buffers())
        states = tensors_in(list(self._optimizer.state.values()))
        parts = [*self._parameters(), *states, *buffers]
        return 2 * sum(bytes_on_a_rank(tensor) for tensor in parts)

    def newest_is_finite(self) -> bool:
        """Whether every weight in the newest copy is; waits for the copy."""
        newest = self._candidate or self._confirmed
        return newest is None or newest.finite is None or bool(newest.finite.wait()[0])

    def far_from_copy(self) -> bool:
        """Whether a weight is out of all proportion to those of the copy to go back to.

        No training multiplies the largest weight of a tensor by 1,000 between two copies; a flipped
        bit of an exponent does. Waits for the copy.
        """
        chosen = self._confirmed or self._candidate
        if chosen is None:
            return False
        for event in chosen.arrived.values():
            event.synchronize()
        kept = [p for p in self._parameters() if p in chosen.weights]
        now = largest_elements(kept)
        before = largest_elements(chosen.weights[p].host for p in kept)
        if now is None or before is None:
            return False
        return bool((now.cpu() > _OUT_OF_SCALE * before.clamp(min=RMS_FLOOR)).any())

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Copy everything as it is before the update of ``step``.

        A candidate that turned out not to be finite is written over; any other is the one to go
        back to from now on.
        """
        if self._candidate is not None and self.newest_is_finite():
            self._confirmed, self._spare = self._candidate, self._confirmed
        elif self._candidate is not None:
            self._spare = self._candidate
        memory, self._spare, self._candidate = self._spare, None, None
        if memory is not None:
            for device, event in memory.arrived.items():
                torch.cuda.current_stream(device).wait_event(event)
        self._candidate = self._copy(step, memory or _Snapshot(step))

    def _copy(self, step: int, memory: _Snapshot) -> _Snapshot:
        snapshot = _Snapshot(step)
        parameters = self._parameters()
        finite = all_finite(parameters)
        snapshot.finite = PendingRead(finite.view(1)) if finite is not None else None
        for p in parameters:
            snapshot.weights[p] = TensorCopy(p, memory.weights.get(p))
            if p in self._optimizer.state:
                snapshot.states[p] = copy_of(self._optimizer.state[p], memory.states.get(p))
        for path, name, buffer in self._buffers():
            snapshot.buffers[path, name] = TensorCopy(buffer, memory.buffers.get((path, name)))
        devices = {t.device for t in parameters if t.is_cuda}
        devices |= {buffer.device for _, _, buffer in self._buffers() if buffer.is_cuda}
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            snapshot.arrived[device] = event
        return snapshot

    @torch.no_grad()
    def restore(self) -> int:
        """Put the older copy back, or the only one; it is the only one then.

        Tensors keep their identity. Parameters that were added since then keep their values.

        Returns:
            The step before whose update it was made.

        Raises:
            RuntimeError: If there is no copy.
        """
        chosen = self._confirmed or self._candidate
        if chosen is None:
            raise RuntimeError("there is no copy of the weights to put back")
        for event in chosen.arrived.values():
            event.synchronize()
        for parameter, weight in chosen.weights.items():
            local_tensor(parameter).detach().copy_(weight.host)
            if parameter in chosen.states:
                present = self._optimizer.state.get(parameter)
                self._optimizer.state[parameter] = put_back(chosen.states[parameter], present)
            else:
                self._optimizer.state.pop(parameter, None)
        modules = dict(self._model.named_modules())
        for (path, name), buffer in chosen.buffers.items():
            if path in modules:
                present = getattr(modules[path], name, None)
                setattr(modules[path], name, buffer.put_back(present))
        if chosen is self._confirmed:
            self._spare = self._candidate or self._spare
        self._confirmed, self._candidate = chosen, None
        return chosen.step

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _buffers(self) -> Iterator[tuple[str, str, Tensor]]:
        """Path of the module, name and value of every buffer, each once."""
        seen: set[Tensor] = set()
        for path, module in self._model.named_modules():
            own = dict(module.named_buffers(recurse=False))
            if own and self._is_elsewhere(path):
                continue
            for name, buffer in own.items():
                if buffer not in seen and is_writable(buffer):
                    seen.add(buffer)
                    yield path, name, buffer

    def _is_elsewhere(self, path: str) -> bool:
        """Whether others train the module, or if it has no parameters the one around it."""
        if not self._elsewhere:
            return False
        while True:
            owned = [id(parameter) for parameter in self._model.get_submodule(path).parameters()]
            if owned or not path:
                return bool(owned) and self._elsewhere.issuperset(owned)
            path = path.rpartition(".")[0]
