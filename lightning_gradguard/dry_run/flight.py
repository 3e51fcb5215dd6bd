"""A few batches before training: how gradients travel through time and depth."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.diagnose import Thresholds
from lightning_gradguard.dry_run.backward import gradients
from lightning_gradguard.dry_run.combine import combine_readings
from lightning_gradguard.dry_run.keepers import is_generator
from lightning_gradguard.dry_run.result import Preflight
from lightning_gradguard.dry_run.training_loss import as_in_training, loss_function
from lightning_gradguard.dry_run.untouched import untouched
from lightning_gradguard.dry_run.words import depth_notes, loss_notes, missing_notes, time_notes
from lightning_gradguard.measure import clean_name
from lightning_gradguard.measure.depth import DepthSlope, weight_depth_slope
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.measure.timesteps import TimestepProbe
from lightning_gradguard.readings import TimeReading


def preflight(
    module: nn.Module,
    batch: Any,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    modules: Literal["auto"] | Sequence[str] | Mapping[str, int] = "auto",
    max_batches: int = 3,
    verbose: bool = True,
) -> Preflight:
    """Measure how gradients travel through a model before it is trained.

    Runs the loss and its backward pass on a few batches in train mode, without an optimizer step.
    The module, its gradients, buffers and metrics, the batch and all random number generators are
    left exactly as they were found, also after an exception; nothing is logged. What a
    ``training_step`` or ``loss`` does elsewhere (files, its own global variables) is its own.

    Submodules that are in eval mode stay so, as in training; a module that is in eval mode itself
    is put into train mode as a whole for the time. Needs memory for a copy of the module's tensors
    beside the gradients. A module that is attached to a trainer runs in the trainer's precision.

    Args:
        module: The model: a LightningModule, or any module if ``loss`` is given.
        batch: A batch as ``training_step`` takes it, on the module's device; or a ``DataLoader``
            of such batches, which is left as it was too (but not a stream that its dataset reads).
        loss: Returns the loss of a batch. Default: ``module.training_step(batch, batch_idx)``.
        modules: Modules to watch along time, as for ``TimestepProbe``. Default ``"auto"``: all
            that are recurrent.
        max_batches: Most batches taken from a ``DataLoader``. Default 3: with the spread between
            them comes the confidence interval of the rates.
        verbose: Whether to print the result. Default ``True``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no loss with a gradient, the module optimizes manually and ``loss``
            is not given, a parameter has no shape yet or is spread over processes, or ``modules``
            matches nothing.

    Example:
        >>> model = nn.LSTM(4, 16)
        >>> sequence = torch.randn(50, 8, 4)
        >>> result = preflight(
        ...     model, sequence, loss=lambda model, x: model(x)[0][-1].square().sum(), verbose=False
        ... )
        >>> [(reading.name, reading.timesteps) for reading in result.time]
        [('LSTM/l0', 50)]
        >>> all(parameter.grad is None for parameter in model.parameters())
        True
    """
    check_type("module", module, nn.Module, "an nn.Module")
    check_number("max_batches", max_batches, at_least=1, integer=True)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of a module and a batch, or None, got {loss!r}")
    parameters = _trainable(module)
    compute = loss_function(module, loss)
    with (
        untouched(module, *_changed_by_reading(batch), outside=_too_large(batch)),
        torch.inference_mode(False),  # turns gradients on, too
        as_in_training(module),
    ):
        if not module.training:
            module.train()
        trial = _Trial(module, parameters, modules)
        with trial.probe:
            for index, one in enumerate(_batches(batch, max_batches)):
                trial.run(compute, one, index)
            result = trial.result()
    if verbose:
        print(result)  # noqa: T201 - the result is for people
    return result


class _Trial:
    """Measures batch after batch."""

    def __init__(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], modules: Any
    ) -> None:
        self.probe = TimestepProbe(module, modules)
        self._automatic = modules == "auto"
        self._parameters = parameters
        self._losses: list[float] = []
        self._readings: list[list[TimeReading]] = []
        self._norms: list[list[float | None]] = []  # of each batch, per parameter

    def run(self, compute: Callable[[Any, int], Tensor], batch: Any, index: int) -> None:
        loss = compute(batch, index)
        grads = gradients(loss, list(self._parameters.values()))
        self._losses.append(loss.item())
        self._readings.append(self.probe.measure())
        self._norms.append([None if grad is None else _norm(grad) for grad in grads])

    def result(self) -> Preflight:
        time = combine_readings(self._readings)
        if self._automatic:  # attention is found too, but has no way through time to speak of
            time = tuple(reading for reading in time if reading.source != "output")
        depth = self._depth()
        thresholds = Thresholds()
        notes = [
            *loss_notes(self._losses),
            *time_notes(time, thresholds),
            *depth_notes(depth, thresholds),
            *missing_notes(self.probe.unwatched, self._without_gradient()),
        ]
        return Preflight(time, depth, tuple(self._losses), tuple(notes))

    def _depth(self) -> DepthSlope:
        """Of the gradients of all batches together."""
        columns = zip(self._parameters, *self._norms, strict=True)
        return weight_depth_slope(
            {
                name: (
                    math.hypot(*(norm or 0.0 for norm in norms)),
                    _norm(self._parameters[name].data),
                )
                for name, *norms in columns
                if self._parameters[name].dim() >= 2
            }
        )

    def _without_gradient(self) -> list[str]:
        columns = zip(self._parameters, *self._norms, strict=True)
        return [name for name, *values in columns if all(value is None for value in values)]


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"module must have parameters with a shape, got {name!r}, which gets one from the "
                "first batch: run the module on a batch before"
            )
        if local_tensor(parameter) is not parameter:
            raise ValueError(
                f"module must have whole parameters, got {name!r}, which is spread over processes"
            )
    found = {clean_name(n): p for n, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"module must have a trainable parameter, got {type(module).__name__}")
    return found


def _batches(batch: Any, max_batches: int) -> list[Any]:
    if not isinstance(batch, DataLoader):
        return [batch]
    # A copy with workers of its own, since persistent ones may have an epoch under way.
    loader = copy.copy(batch)
    vars(loader).update(_iterator=None)
    batches = list(itertools.islice(loader, max_batches))
    if not batches:
        raise ValueError("batch must be a DataLoader with at least one batch, got none")
    return batches


def _changed_by_reading(batch: Any) -> Iterator[Any]:
    """What using the batch, or reading the loader, may change."""
    if not isinstance(batch, DataLoader):
        yield batch
        return
    sampler = batch.batch_sampler
    samplers = (batch.sampler, sampler, getattr(sampler, "sampler", None))
    yield from (vars(part) for part in samplers if hasattr(part, "__dict__"))
    holders: Iterable[Any] = (batch, batch.dataset)
    for holder in holders:
        attributes = vars(holder).values() if hasattr(holder, "__dict__") else ()
        yield from (value for value in attributes if is_generator(value))


def _too_large(batch: Any) -> list[Any]:
    """The data itself, of which a copy may not fit into memory."""
    return [batch.dataset] if isinstance(batch, DataLoader) else []


def _norm(tensor: Tensor) -> float:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    norm: float = torch.linalg.vector_norm(tensor, dtype=dtype).item()
    return norm
