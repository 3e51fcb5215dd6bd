"""A forward and a backward pass of a module, as it is, as a CUDA graph, or with a compiled cell.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.modules.contenders import Make
from benchmarks.timesteps.models import Shape, Task
from lightning_gradguard.nn._scan import Cell, States

Way = Callable[[nn.Module, Tensor], nn.Module]


class Passes(Task):
    """One module with its input, which needs a gradient as in the middle of a model.

    Args:
        kind: What is said of it.
        make: Makes the module.
        shape: Sizes.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of weights and input.
        way: Makes of the module what is run.
    """

    def __init__(
        self,
        kind: str,
        make: Make,
        shape: Shape,
        device: str,
        dtype: torch.dtype,
        way: Way | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.kind, self.shape, self.device = kind, shape, device
        module = make(shape).to(device, dtype)
        size = (shape.timesteps, shape.sequences, shape.input_size)
        self.inputs = torch.randn(size).to(device, dtype).requires_grad_()
        self.model = module if way is None else way(module, self.inputs)
        self._parameters = [self.inputs, *module.parameters()]
        with torch.no_grad():
            output: Tensor = self.model(self.inputs)[0]
        self._gradient = torch.randn(output.shape).to(output)

    @override
    def step(self) -> None:
        """Forward and backward pass, with a gradient for the whole output."""
        self._run()

    def _run(self) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        output: Tensor = self.model(self.inputs)[0]
        output.backward(self._gradient)
        return output.detach()

    def apart(self, other: Passes) -> float:
        """Largest relative difference in output and input gradient to another with its weights."""
        pairs = zip(self._found(), other._found(), strict=True)
        return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)

    def _found(self) -> list[Tensor]:
        found = [self._run(), self.inputs.grad]
        return [tensor.float() for tensor in found if tensor is not None]


class _Compiled(Cell):
    """A cell whose timestep is compiled, by itself: a loop over all of them compiles for hours."""

    def __init__(self, cell: Cell, compiled: Callable[..., States]) -> None:
        self.computed = cell.computed
        self._cell, self._compiled = cell, compiled

    @override
    def project(self, x: Tensor) -> States:
        return self._cell.project(x)

    @override
    def step(self, number: int, projected: States, states: States) -> States:
        return self._compiled(self._cell, number, projected, states)


def _step(cell: Cell, number: int, projected: States, states: States) -> States:
    return cell.step(number, projected, states)


def compiled(module: nn.Module, inputs: Tensor) -> nn.Module:
    """The module with the timestep of its cells compiled, or an error if some is not."""
    of_weights: Any = getattr(module, "_cell", None)
    if of_weights is None:
        raise TypeError(f"{type(module).__name__} has no cell that could be compiled alone")
    # Each cell has its own share of compilations, one for each pattern of states without gradient.
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001
    step = torch.compile(_step, fullgraph=True)
    module.__dict__["_cell"] = lambda weights, part: _Compiled(of_weights(weights, part), step)
    return module


class _Output(nn.Module):
    """The output alone, as a graph can only return tensors in plain tuples."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, input_TBI: Tensor) -> tuple[Tensor]:
        return (self.module(input_TBI)[0],)


def graphed(module: nn.Module, inputs: Tensor) -> nn.Module:
    """The module with its passes captured as CUDA graphs."""
    example = torch.randn_like(inputs).requires_grad_()
    alone = _Output(module)
    torch.cuda.make_graphed_callables(alone, (example,))  # replaces its forward
    return alone


def compiled_and_graphed(module: nn.Module, inputs: Tensor) -> nn.Module:
    """Both."""
    return graphed(compiled(module, inputs), inputs)


WAYS: Mapping[str, Way] = {"graphed": graphed, "compiled, graphed": compiled_and_graphed}
