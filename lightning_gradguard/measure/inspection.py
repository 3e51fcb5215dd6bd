"""A look at every layer around one optimizer step.

Shape suffixes: ``P`` parameters that are measured.

Example:
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> from lightning_gradguard.measure import grad_norms
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> inspector = LayerInspector(model, optimizer)
    >>> inspector.watching = True
    >>> model(torch.randn(32, 4)).square().mean().backward()
    >>> inspector.before_step(grad_norms(model))
    True
    >>> optimizer.step()
    >>> snapshot = inspector.after_step(dropped=False)
    >>> inspection = snapshot.decode(snapshot.values.tolist(), step=0)
    >>> [reading.name for reading in inspection.parameters if reading.update_ratio > 0]
    ['0.weight', '0.bias', '2.weight', '2.bias']
    >>> inspector.close()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.measure._drafts import widest
from lightning_gradguard.measure._gradient_samples import GradientSamples, plain_gradient
from lightning_gradguard.measure._usage import Seen, UsageWatch
from lightning_gradguard.measure._weights import Weight, norms_of, weight_norms, weights_of
from lightning_gradguard.measure.activations import ActivationSnapshot, ActivationWatch
from lightning_gradguard.measure.depth import weight_depth_slope
from lightning_gradguard.measure.model_facts import host_value
from lightning_gradguard.measure.norms import GradNorms
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.measure.updates import UpdateSampler
from lightning_gradguard.readings import Inspection, ParameterReading

# What is measured of each of the optimizer's parameters, in the order of the numbers.
_FIELDS = ("weight_norm", "zero_share", "tiny_share", "dead_rows", "update_ratio")


@dataclass(frozen=True, eq=False)
class _Begun:
    """What was measured before a step, and what the host knows without measuring."""

    values: Tensor
    normed: tuple[str, ...]  # parameters by the order of their gradient norms, "" without one
    measured: tuple[str, ...]
    known: tuple[dict[str, Any], ...]  # fields of the readings
    activations: ActivationSnapshot


@dataclass(frozen=True, eq=False)
class InspectionSnapshot:
    """What an inspector has seen, still on the device.

    Attributes:
        values: (N,) all numbers, for one copy to the host; :meth:`decode` reads them.
    """

    values: Tensor
    _begun: _Begun = field(repr=False)

    def decode(self, values: Sequence[float], step: int) -> Inspection:
        """The inspection of ``step``, from the numbers of :attr:`values`, now on the host."""
        rest = iter(values)
        dropped = bool(next(rest))
        norms = {name: next(rest) for name in self._begun.normed}
        measured = self._begun.measured
        columns = {one: [next(rest) for _ in measured] for one in _FIELDS}
        # A fused optimizer drops a step that is not finite by itself, and nobody is told.
        finite = all(map(math.isfinite, norms.values()))
        if dropped or not (finite or any(ratio > 0.0 for ratio in columns["update_ratio"])):
            columns["update_ratio"] = [math.nan] * len(measured)
        numbers = {
            name: dict(zip(_FIELDS, row, strict=True))
            for name, *row in zip(measured, *columns.values(), strict=True)
        }
        parameters = tuple(
            _reading(known, norms.get(known["name"]), numbers.get(known["name"], {}))
            for known in self._begun.known
        )
        depth = weight_depth_slope(
            {
                p.name: (norms.get(p.name, 0.0), p.weight_norm)
                for p in parameters
                if p.name in numbers and p.dims >= 2 and p.requires_grad
            }
        )
        return Inspection(
            step=step,
            parameters=parameters,
            activations=self._begun.activations.decode(list(rest)),
            depth_slope=depth.slope,
            depth_error=depth.error,
            depth_layers=depth.layers,
        )


def _reading(
    known: Mapping[str, Any], norm: float | None, numbers: Mapping[str, Any]
) -> ParameterReading:
    if norm is None:
        return ParameterReading(**known, **numbers)
    reading = ParameterReading(**known, grad_norm=norm, **numbers)
    if norm == 0:
        return reading
    return replace(reading, used=True, used_without_grad=False) if not reading.used else reading


class LayerInspector:
    """Measures what an :class:`Inspection` consists of, around one step of an optimizer.

    Nothing is read by the host, and nothing is sent to other processes: of a sharded tensor each
    looks at its own shard, and takes the whole weight to be like it. The norm of its gradient is
    that of the whole tensor, as given.

    Args:
        model: The model.
        optimizer: The optimizer; its parameters are measured.
        trained_elsewhere: Parameters of other optimizers of the run, which are not.
        on_error: Told of an error inside a hook, which then lets the user's forward pass go on;
            default: the error is raised there.

    Attributes:
        activations: Counts dead and saturated units.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        trained_elsewhere: Collection[Tensor] = (),
        *,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self.activations = ActivationWatch(model, on_error=on_error)
        self._usage = UsageWatch(model, on_error=on_error)
        self._model = model
        self.follow(optimizer, trained_elsewhere)

    def follow(self, optimizer: Optimizer, trained_elsewhere: Collection[Tensor] = ()) -> None:
        """Measure the parameters that ``optimizer`` has now: groups can be added at any time."""
        self._optimizer = optimizer
        self._elsewhere = tuple(trained_elsewhere)
        self._begun: _Begun | None = None
        self._weights = weights_of(self._model, optimizer, self._elsewhere, self._usage)
        self._own = [weight for weight in self._weights if weight.group is not None]
        self._samples = GradientSamples()
        # Of shards it is given what this process holds, and so sends nothing.
        self._updates = UpdateSampler([local_tensor(weight.parameter) for weight in self._own])

    @property
    def watching(self) -> bool:
        """Whether the coming forward passes are watched; default ``False``.

        There are hooks on the model only while they are.
        """
        return self._usage.watching

    @watching.setter
    def watching(self, value: bool) -> None:
        self.activations.watching = self._usage.watching = value

    def __len__(self) -> int:
        return len(self._weights)

    @torch.no_grad()
    def before_step(self, norms: GradNorms, scale: float = 1.0, *, scaled: bool = False) -> bool:
        """Look at gradients and weights, and at what the forward passes have left.

        Call it after the backward pass, before gradients are clipped or dropped.

        Args:
            norms: Of the optimizer's parameters.
            scale: What the loss was multiplied by in the backward pass, as by a gradient scaler.
            scaled: Whether gradients still are, as those of a fused optimizer with a scaler.

        Returns:
            Whether any call of a module was seen with gradients on.
        """
        if self._is_stale():
            self.follow(self._optimizer, self._elsewhere)
        seen = self._usage.look()
        # A gradient of float32 may have been computed in float16, which then shows in its digits.
        half_scale = (1.0 if scaled else scale) if seen.half or scale != 1.0 else 0.0
        grads = [plain_gradient(weight.parameter) for weight in self._own]
        shares_3P = self._samples.measure(grads, [w.row_dim for w in self._own], half_scale)
        outside = [
            weight
            for weight in self._weights
            if weight.group is None and not weight.elsewhere and weight.parameter.grad is not None
        ]
        device = norms.values.device
        dtype = widest(device)
        outer_norms = norms_of([plain_gradient(w.parameter) for w in outside], device, dtype)
        weights_P = weight_norms(self._own, device, dtype)
        parts = (norms.values, outer_norms, weights_P, shares_3P)
        names = zip(norms.names, norms.present, strict=True)
        self._begun = _Begun(
            torch.cat([part.reshape(-1).to(device, dtype, non_blocking=True) for part in parts]),
            tuple([name if there else "" for name, there in names] + [w.name for w in outside]),
            tuple(weight.name for weight in self._own),
            tuple(self._known(weight, seen) for weight in self._weights),
            self.activations.look(),
        )
        self._updates.ratios()  # what comes after the step is compared with this
        return bool(seen.with_grad)

    @torch.no_grad()
    def after_step(self, dropped: bool | Tensor = False) -> InspectionSnapshot | None:
        """Look at what the step has changed; ``None`` if it was not begun.

        Args:
            dropped: Whether the step was left out; may be a 0-dim tensor on the device.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        ratios_P = self._updates.ratios()
        values = begun.values
        if isinstance(dropped, Tensor):
            flag = dropped.detach().reshape(1)
        else:
            flag = values.new_full((1,), float(dropped))
        parts = [flag, values, values[:0] if ratios_P is None else ratios_P]
        parts.append(begun.activations.values)
        moved = [part.to(values.device, values.dtype, non_blocking=True) for part in parts]
        return InspectionSnapshot(torch.cat(moved), begun)

    def discard(self) -> None:
        """Forget a step that was begun, and what forward passes since the last look have left."""
        self._begun = None
        self._usage.discard()
        self.activations.discard()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._begun = None
        self._usage.close()
        self.activations.close()

    def _is_stale(self) -> bool:
        return self._updates.stale() or any(weight.is_stale for weight in self._weights)

    def _known(self, weight: Weight, seen: Seen) -> dict[str, Any]:
        parameter = weight.parameter
        used: tuple[bool | None, bool] = None, False
        # Others may hold it still in their part of the step: that is no fault of this one.
        if not weight.elsewhere:
            has_grad = parameter.grad is not None
            used = self._usage.used(parameter, seen, has_grad=has_grad)
        return {
            "name": weight.name,
            "elements": weight.elements,
            "dims": weight.dims,
            # As `toggle_optimizer` holds them still in the step of another optimizer: no freeze.
            "requires_grad": parameter.requires_grad or weight.elsewhere,
            "in_optimizer": weight.elsewhere or weight.group is not None,
            "used": used[0],
            "used_without_grad": used[1],
            "lr": math.nan if weight.group is None else host_value(weight.group.get("lr")),
        }
