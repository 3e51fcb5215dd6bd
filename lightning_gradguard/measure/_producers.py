"""Which layer feeds an activation, and along which dimension of its output the units lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_gradguard.measure._layers import clean_name

_CHANNELS = (
    nn.modules.conv._ConvNd,  # noqa: SLF001 - has no public name
    nn.modules.batchnorm._NormBase,  # noqa: SLF001 - has no public name
    nn.GroupNorm,
)
# Operations between a layer's own and the activation, such as views.
_FARTHEST = 8
# What a weight goes through before its layer's own operation.
_OF_WEIGHTS = ("TBackward", "TransposeBackward", "ToCopyBackward", "PermuteBackward")


@dataclass(frozen=True)
class Producer:
    """A layer that feeds an activation.

    Attributes:
        name: Its path.
        axis: Dimension of its units if its output has three or more; ``None``: the last one.
    """

    name: str
    axis: int | None


class Producers:
    """Knows the parameters of a model by the layer that they belong to.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[int, Producer] = {}
        for raw, module in model.named_modules():
            name = clean_name(f"{raw}.").rstrip(".")
            for parameter in module.parameters(recurse=False):
                self._layers.setdefault(id(parameter), Producer(name, _axis(module)))

    def modules(self) -> Iterator[tuple[Producer, nn.Module]]:
        """Modules with their names, and the axis of the last one with weights before each.

        What is inside an ``nn.TransformerEncoderLayer`` is left out.
        """
        axis: int | None = None
        inside: set[int] = set()
        for raw, module in self._model.named_modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                inside.update(id(part) for part in module.modules())
            if id(module) in inside:
                continue
            name = clean_name(f"{raw}.").rstrip(".") or type(module).__name__
            yield Producer(name, axis), module
            if next(module.parameters(recurse=False), None) is not None:
                axis = _axis(module)

    def of(self, output: Any) -> Producer | None:
        """The layer whose operation comes right before that of ``output``, if that shows."""
        node = output.grad_fn if isinstance(output, Tensor) else None
        for _ in range(_FARTHEST):
            before = _before(node)
            for function in before:
                found = self._layers.get(id(_parameter(function)))
                if found is not None:
                    return found
            if len(before) != 1:
                break
            node = before[0]
        return None


def _axis(module: nn.Module) -> int | None:
    return 1 if isinstance(module, _CHANNELS) else None


def _before(node: Any) -> list[Any]:
    following = () if node is None else node.next_functions
    return [function for function, _ in following if function is not None]


def _parameter(node: Any) -> Any:
    """The parameter that enters at ``node``, as it is or transposed or cast."""
    for _ in range(_FARTHEST):
        if hasattr(node, "variable"):  # of the node where a gradient is accumulated
            return node.variable
        before = _before(node) if node.name().startswith(_OF_WEIGHTS) else []
        if len(before) != 1:
            break
        node = before[0]
    return None


def unit_axis(value: Tensor, axis: int | None) -> int:
    """The dimension of the units.

    Args:
        value: Output of an activation.
        axis: Where its units are if it has three dimensions or more; ``None``: in the last one.
    """
    return axis if axis is not None and value.dim() >= 3 else value.dim() - 1
