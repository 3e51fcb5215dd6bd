"""Gradient norms of each parameter, of each layer and in total, left on their device.

Shape suffixes: ``P`` parameters, ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradguard.measure._layers import clean_name, layer_index
from lightning_gradguard.measure._plan import Plan, StalePlanError, make_plan, norm_each

__all__ = ["GradNorms", "NormMeter", "clean_name", "grad_norms", "layer_index", "norm_each"]

_LayerCache = dict[tuple[int | None, tuple[bool, ...]], tuple[tuple[str, ...], Tensor]]


@dataclass(frozen=True, eq=False)
class GradNorms:
    """L2 norms of the gradients of one backward pass.

    Nothing is read by the host until :attr:`parameters` or :meth:`layers` is asked for. NaN and
    infinity in a gradient show in its norm, in its layer's and in the total.

    Attributes:
        names: Names of the parameters.
        values: Norm of each parameter's gradient, shape ``(P,)``, in gradient units; float32, or
            float64 if any gradient is. 0 where there is no gradient.
        total: Norm of all gradients together, shape ``()``.
        present: Whether each parameter has a gradient.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> norms = grad_norms(model)
        >>> norms.parameters
        {'weight': 5.0, 'bias': 1.0}
        >>> round(norms.total.item() ** 2)
        26
    """

    names: tuple[str, ...]
    values: Tensor
    total: Tensor
    present: tuple[bool, ...]
    # Group numbers that are on the device already; a meter shares them among its results.
    _layers: _LayerCache = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> dict[str, float]:
        """Norm of each parameter that has a gradient (one host read)."""
        read = zip(self.names, self.values.tolist(), self.present, strict=True)
        return {name: value for name, value, present in read if present}

    def layers(self, depth: int | None = None) -> dict[str, float]:
        """Return the norm of each layer that has a gradient (one host read).

        Args:
            depth: Number of leading components of the module path that make a layer, see
                :func:`layer_index`. Default: the whole path.

        Raises:
            TypeError: If ``depth`` is neither an integer nor ``None``.
            ValueError: If ``depth`` is less than 1.

        Example:
            >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> list(grad_norms(model).layers())
            ['0.0', '1']
            >>> list(grad_norms(model).layers(depth=1))
            ['0', '1']
        """
        names, values_L = self.layer_values(depth)
        return dict(zip(names, values_L.tolist(), strict=True))

    def layer_values(self, depth: int | None = None) -> tuple[tuple[str, ...], Tensor]:
        """Return layer names and their norms, shape ``(L,)``, still on the device.

        The same as :meth:`layers` without the host read.

        Args:
            depth: As for :meth:`layers`.

        Raises:
            TypeError: If ``depth`` is neither an integer nor ``None``.
            ValueError: If ``depth`` is less than 1.
        """
        key = (depth, self.present)
        if key not in self._layers:
            self._layers[key] = self._group(depth)
        names, groups_P = self._layers[key]
        # In float64, as squares of float32 norms leave the range of float32.
        squares_P = self.values.to(_widest(self.values.device)).square()
        # One slot more than layers: parameters of layers without any gradient go there.
        sums = squares_P.new_zeros(len(names) + 1).index_add_(0, groups_P, squares_P)
        return names, sums[:-1].sqrt_().to(self.values.dtype)

    def _group(self, depth: int | None) -> tuple[tuple[str, ...], Tensor]:
        names = [name for name, present in zip(self.names, self.present, strict=True) if present]
        layers, numbers = layer_index(names, depth)
        following = iter(numbers)
        groups = [next(following) if present else len(layers) for present in self.present]
        return tuple(layers), torch.tensor(groups, dtype=torch.int64, device=self.values.device)


class NormMeter:
    """Measures the gradient norms of a fixed set of parameters, step after step.

    The parameters are sorted by device, dtype and kind of gradient once, and again when their
    gradients change in kind. A measurement is one multi-tensor norm for each device and dtype, one
    stack and one norm of the norms; many small CPU tensors of one shape are stacked instead.

    Complex gradients count as pairs of real numbers. Sparse gradients are coalesced (which makes
    the host wait on a GPU). ``DTensor`` gradients (FSDP2, tensor parallelism) give the norm of the
    whole tensor in one collective for all tensors that are sharded alike, so every process of the
    mesh has to measure. Squares are summed in float32: norms beyond 1.8e19 are infinite, as in
    ``clip_grad_norm_``, and elements below 1e-23 count as zero.

    Args:
        named_parameters: Names and tensors, as from ``model.named_parameters()``. A tensor that
            comes again under another name is measured once, under its first name.

    Attributes:
        names: Names without the components that wrappers add, see :func:`clean_name`.
        parameters: The tensors, in the order given.

    Raises:
        TypeError: If a parameter is not a tensor.
        ValueError: If two tensors share a name, or a tensor keeps no gradient because it is not a
            leaf.

    Example:
        >>> model = nn.LSTM(3, 4)
        >>> meter = NormMeter(model.named_parameters())
        >>> output, _ = model(torch.ones(5, 1, 3))
        >>> output.sum().backward()
        >>> norms = meter.measure()
        >>> norms.values.shape, norms.total.shape
        (torch.Size([4]), torch.Size([]))
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        by_name: dict[str, Tensor] = {}
        seen: set[int] = set()
        for raw_name, parameter in named_parameters:
            name = clean_name(raw_name)
            if not isinstance(parameter, Tensor):
                raise TypeError(f"parameter {name!r} must be a tensor, got {parameter!r}")
            if not (parameter.is_leaf or parameter.retains_grad):
                raise ValueError(f"parameter {name!r} must be a leaf or retain its gradient")
            if id(parameter) in seen:
                continue
            if name in by_name:
                raise ValueError(f"two tensors of named_parameters share the name {name!r}")
            seen.add(id(parameter))
            by_name[name] = parameter
        self.names: tuple[str, ...] = tuple(by_name)
        self.parameters: tuple[Tensor, ...] = tuple(by_name.values())
        self._plan: Plan | None = None
        self._layers: _LayerCache = {}

    def measure(self) -> GradNorms:
        """Return the norms of the gradients that the parameters have now.

        Reads no value on the host and leaves the gradients as they are.
        """
        if not self.parameters:
            return GradNorms((), torch.zeros(0), torch.zeros(()), ())
        with torch.no_grad():
            plan, local_P = self._read()
            values_P = plan.combine(local_P)
            total = torch.linalg.vector_norm(values_P)
        return GradNorms(self.names, values_P, total, plan.present, self._layers)

    def _read(self) -> tuple[Plan, Tensor]:
        plan = self._plan
        if plan is not None:
            try:
                return plan, plan.local_norms()
            except (StalePlanError, RuntimeError, TypeError):
                # Asking every tensor for its kind on every step would cost as much as the norms do
                # when there are many small ones. What is wrong for another reason raises below.
                self._plan = None
        plan = make_plan(self.parameters)
        local_P = plan.local_norms()
        self._plan = plan
        return plan, local_P


def grad_norms(source: nn.Module | Iterable[tuple[str, Tensor]]) -> GradNorms:
    """Measure gradient norms once; keep a :class:`NormMeter` to do so on every step.

    Args:
        source: A module, or names and parameters.

    Example:
        >>> scale = nn.Parameter(torch.ones(3))
        >>> scale.sum().backward()
        >>> grad_norms([("scale", scale)]).total
        tensor(1.7321)
    """
    named = source.named_parameters() if isinstance(source, nn.Module) else source
    return NormMeter(named).measure()


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
