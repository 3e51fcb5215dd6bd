"""What the peers see of a step, read from the model in one pass over all tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.detection.records import ActivationFeatures, StepFeatures, TensorFeatures

ACTIVATIONS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid,
)  # fmt: skip

# TheDeepChecker: 95th percentile of |a|; SageMaker Debugger: active in less than 1%, tanh limit.
_PERCENTILE, _SMALL = 0.95, 1e-5
_LEAST_ACTIVE = 0.01
_BEYOND, _TANH_LIMIT = 5.0, 9.4999
# Outputs of each channel of an image that its shares rest on: of more, the first examples will do.
_ENOUGH = 1024


class FeatureReader:
    """Reads a model during training.

    Args:
        model: The model.
        optimizer: Its optimizer.
        steps: Budget of the run.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        self._model, self._optimizer, self._steps = model, optimizer, steps
        self._order: dict[str, int] = {}
        self._seen: dict[str, tuple[str, Tensor, Tensor]] = {}
        self._before: dict[str, Tensor] = {}
        self._watching = False
        self._handles = [
            module.register_forward_pre_hook(partial(self._note_order, name))
            for name, module in model.named_modules()
        ]
        self._handles += [
            module.register_forward_hook(partial(self._note_output, name))
            for name, module in model.named_modules()
            if isinstance(module, ACTIVATIONS)
        ]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, the forward passes are those of training."""
        self._seen = {}
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def read(self, step: int, loss: float, batch: Any, accuracy: float | None) -> StepFeatures:
        """All of one step, after the backward pass and before any clipping.

        Args:
            step: Number of the step.
            loss: Its loss.
            batch: Its batch, inputs first.
            accuracy: If it was asked for.
        """
        with torch.no_grad():
            return StepFeatures(
                step=step,
                steps=self._steps,
                loss=loss,
                tensors=self._read_tensors(),
                activations=[
                    _read_activation(name, kind, inputs, outputs)
                    for name, (kind, inputs, outputs) in self._seen.items()
                ],
                accuracy=accuracy,
                lr=float(self._optimizer.param_groups[0]["lr"]),
                inputs=_range(batch[0]),
            )

    def close(self) -> None:
        """Takes all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._seen = {}

    def _note_order(self, name: str, module: nn.Module, inputs: Any) -> None:
        if self._watching and name not in self._order:
            self._order[name] = len(self._order)

    def _note_output(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._watching:
            kind = type(module).__name__.lower()
            self._seen[name] = (kind, inputs[0].detach(), output.detach())

    def _place(self, parameter: str) -> int:
        """When the module of a parameter ran first; one that is only read runs with its parent."""
        path = parameter.rpartition(".")[0]
        while path and path not in self._order:
            path = path.rpartition(".")[0]
        return self._order.get(path, len(self._order))

    def _read_tensors(self) -> list[TensorFeatures]:
        named = {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and (parameter.grad is not None or name in self._before)
        }
        names = sorted(named, key=self._place)
        if not names:
            return []
        values = [named[name].detach().float() for name in names]
        grads = [named[name].grad for name in names]
        present = [index for index, grad in enumerate(grads) if grad is not None]
        rows = _read_gradients([g.float() for g in grads if g is not None])
        of_gradient = dict(zip(present, rows, strict=True))
        nothing = [math.nan] * 5
        of_weight = _read_weights(values, [self._before.get(name) for name in names])
        self._before = dict(zip(names, (value.clone() for value in values), strict=True))
        features = []
        for index, name in enumerate(names):
            mean, median, largest, norm, zeros = of_gradient.get(index, nothing)
            weight_norm, mean_weight, mean_update = of_weight[index]
            features.append(
                TensorFeatures(
                    name=name,
                    mean_abs_grad=mean,
                    median_abs_grad=median,
                    max_abs_grad=largest,
                    grad_norm=norm,
                    zero_share=zeros,
                    finite=index not in of_gradient or math.isfinite(largest),
                    weight_norm=weight_norm,
                    mean_abs_weight=mean_weight,
                    mean_abs_update=mean_update,
                    is_weight=named[name].dim() > 1,
                )
            )
        return features


def _read_gradients(grads: list[Tensor]) -> list[list[float]]:
    """Of each: mean, median and largest magnitude, norm, share of zeros."""
    if not grads:
        return []
    sizes = torch.tensor([grad.numel() for grad in grads])
    magnitudes = torch._foreach_abs(grads)
    nonzero = torch.stack([torch.count_nonzero(grad) for grad in grads])
    columns = [
        torch.stack(torch._foreach_norm(grads, 1)) / sizes,
        torch.stack([magnitude.median() for magnitude in magnitudes]),
        torch.stack(torch._foreach_max(magnitudes)),
        torch.stack(torch._foreach_norm(grads)),
        1 - nonzero / sizes,
    ]
    rows: list[list[float]] = torch.stack(columns, dim=1).tolist()
    return rows


def _read_weights(values: list[Tensor], before: list[Tensor | None]) -> list[list[float]]:
    """Of each: norm, mean magnitude, mean magnitude of its last change (NaN if there was none)."""
    sizes = torch.tensor([value.numel() for value in values])
    known = [value if old is None else old for value, old in zip(values, before, strict=True)]
    changes = torch._foreach_sub(values, known)
    new = torch.tensor([math.nan if old is None else 0.0 for old in before])
    columns = [
        torch.stack(torch._foreach_norm(values)),
        torch.stack(torch._foreach_norm(values, 1)) / sizes,
        torch.stack(torch._foreach_norm(changes, 1)) / sizes + new,
    ]
    rows: list[list[float]] = torch.stack(columns, dim=1).tolist()
    return rows


def _read_activation(name: str, kind: str, inputs: Tensor, outputs: Tensor) -> ActivationFeatures:
    if outputs.dim() == 4:  # an image: every pixel is an output of its channel
        enough = math.ceil(_ENOUGH / outputs[0, 0].numel())
        inputs, outputs = inputs[:enough], outputs[:enough].movedim(1, -1)
    inputs, units = inputs.float(), outputs.float().reshape(-1, outputs.shape[-1])
    magnitudes, reach = units.abs(), inputs.abs()
    active = (units > 0).float()
    small = (magnitudes < _SMALL).float().mean(0)
    shares: list[float] = torch.stack(
        [
            1 - active.mean(),
            (small >= _PERCENTILE).float().mean(),
            (active.mean(0) < _LEAST_ACTIVE).float().mean(),
            (reach > _BEYOND).float().mean(),
            (reach > _TANH_LIMIT).float().mean(),
            _saturation(kind, units),
        ]
    ).tolist()
    return ActivationFeatures(name, kind, *shares)


def _saturation(kind: str, units: Tensor) -> Tensor:
    if kind == "tanh":
        return units.abs().mean()
    if kind == "sigmoid":
        return 2 * (units - 0.5).abs().mean()
    return units.new_tensor(math.nan)


def _range(inputs: Any) -> tuple[float, float] | None:
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        least, most = inputs.aminmax()
        return float(least), float(most)
    return None
