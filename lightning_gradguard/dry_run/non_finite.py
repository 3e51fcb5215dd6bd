"""Look again at a step that was not finite, for where NaN or Inf came from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.dry_run.alone import alone
from lightning_gradguard.dry_run.backward import gradients
from lightning_gradguard.dry_run.finite import Slices, is_finite, tensors_of
from lightning_gradguard.dry_run.first_non_finite import FirstNonFinite, Sight
from lightning_gradguard.dry_run.training_loss import as_in_training, loss_function
from lightning_gradguard.dry_run.untouched import untouched
from lightning_gradguard.measure import clean_name
from lightning_gradguard.measure.sharding import local_tensor
from lightning_gradguard.readings import NonFiniteOrigin

_Compute = Callable[[Any, int], Tensor]


def locate_non_finite(
    module: nn.Module,
    batch: Any,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batch_idx: int = 0,
) -> NonFiniteOrigin | None:
    """Find where NaN or Inf first appears in the loss of a batch or in its gradients.

    Runs the loss and its backward pass once more, in train mode; everything is left exactly as it
    was found, as by :func:`lightning_gradguard.preflight`. The random numbers are those that come
    next: set their state to find what a step with dropout has met. No process waits for another.

    Looks at, in this order:

    1. the weights;
    2. the batch: it is to blame if all is finite once another value of the same tensor stands in
       place of each that is not. NaN that the model fills in, or minus infinity in a mask, is not;
    3. if the loss is not finite: the outputs of all modules in the order in which they run, then
       the loss itself. The deepest module is named whose output is not finite although its input
       is; the path is empty where it happens between modules;
    4. if it is: gradients, from the loss back. The deepest module is named at whose output they
       are finite and at its input or weights are not; the path is empty for what lies between the
       modules and the loss.

    The timestep is the first that is not finite, of a gradient the last, since that is where it
    begins on its way back; the sample is the first that is not finite there. Recurrent modules and
    attention tell by ``batch_first`` which axis is time, also of other tensors of the same sizes;
    of cells it is the number of the call. All other tensors of 3 dimensions are taken for (samples,
    time, features), of other numbers of dimensions the timestep is not known.

    Args:
        module: The model: a LightningModule, or any module if ``loss`` is given.
        batch: The batch as ``training_step`` takes it, on the module's device.
        loss: Returns the loss of a batch. Default: ``module.training_step(batch, batch_idx)``.
        batch_idx: Number of the batch, for ``training_step``.

    Returns:
        The origin; ``None`` if this time everything is finite, or it cannot be told.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no loss with a gradient, the module optimizes manually and ``loss``
            is not given, a parameter has no shape yet or is spread over processes, or the loss
            needs other processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        >>> batch = torch.ones(4, 3)
        >>> batch[2, 0] = float("nan")
        >>> locate_non_finite(model, batch, loss=lambda model, x: model(x).sum())
        NonFiniteOrigin(place='batch', module='', timestep=None, sample=2)
    """
    check_type("module", module, nn.Module, "an nn.Module")
    check_number("batch_idx", batch_idx, at_least=0, integer=True)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of a module and a batch, or None, got {loss!r}")
    _check_parameters(module)
    compute = loss_function(module, loss)
    origin = _in_weights(module)
    if origin is not None:
        return origin
    search = _Search(module, batch, compute, batch_idx)
    return search.origin()


def _check_parameters(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if local_tensor(parameter) is not parameter or nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"module must have whole parameters with a shape, got {name!r}, which has no shape "
                "yet or is spread over processes"
            )


def _in_weights(module: nn.Module) -> NonFiniteOrigin | None:
    """The first module whose weights are not finite.

    Buffers are left out: running statistics are so after a forward pass that was. What is frozen
    may be a mask.
    """
    for name, parameter in module.named_parameters():
        if not is_finite(parameter, mask=not parameter.requires_grad):
            name = clean_name(name)
            return NonFiniteOrigin("weights", name.rpartition(".")[0], tensor=name)
    return None


class _Search:
    """Runs one batch again.

    Args:
        module: The model.
        batch: The batch.
        compute: Its loss.
        batch_idx: Its number.
    """

    def __init__(self, module: nn.Module, batch: Any, compute: _Compute, batch_idx: int) -> None:
        self._module = module
        self._batch = batch
        self._compute = compute
        self._batch_idx = batch_idx
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        found = list(tensors_of(batch))
        self._samples = {size for _, value in found for size in _leading_sizes(value)}
        self._suspects = [(path, value) for path, value in found if not is_finite(value)]
        self._layouts: dict[tuple[int, ...], int] = {}

    def origin(self) -> NonFiniteOrigin | None:
        slices = [Slices.of(value) for _, value in self._suspects]
        with self._replay():
            origin = self._watched()
        if origin is None or not self._suspects or not self._batch_is_to_blame():
            return origin
        path = self._suspects[0][0]
        return self._described("batch", path, slices[0], path)

    @contextlib.contextmanager
    def _replay(self) -> Iterator[None]:
        tensors = [_tensor(value) for _, value in self._suspects]
        with (
            untouched(self._module, self._batch, *tensors),
            torch.inference_mode(False),  # turns gradients on, too
            as_in_training(self._module),
            alone(self._module),
        ):
            if not self._module.training:
                self._module.train()
            yield

    def _watched(self) -> NonFiniteOrigin | None:
        with FirstNonFinite(self._module, _kept_between_batches(self._module)) as watch:
            loss = self._compute(self._batch, self._batch_idx)
            self._layouts = watch.layouts
            if not is_finite(loss):
                return self._of_forward(watch)
            watch.turn_back()
            bad = _bad_ones(self._parameters, gradients(loss, self._parameters))
            return self._of_backward(watch, bad) if bad else None

    def _of_forward(self, watch: FirstNonFinite) -> NonFiniteOrigin | None:
        sight = watch.made or watch.passed_on
        if sight is None:
            return NonFiniteOrigin("loss", tensor="loss")
        if sight.carried:
            return None  # by now it is no more what it was in the step that was not finite
        if watch.made is None:
            return self._described("forward", "", sight.slices, "")
        return self._of_sight("forward", sight)

    def _of_backward(self, watch: FirstNonFinite, bad: set[int]) -> NonFiniteOrigin:
        if watch.backward is not None:
            return self._of_sight("backward", watch.backward)
        call = watch.with_bad_weights(bad)
        if call is not None:
            named = call.module.named_parameters()
            name = next(clean_name(name) for name, p in named if id(p) in bad)
            return NonFiniteOrigin("backward", call.path, tensor=f"gradient of {name}")
        if watch.arrived is not None:
            call, slices = watch.arrived.call, watch.arrived.slices
            said = f"gradient of the output of {call.path or 'the model'}"
            return self._described("backward", "", slices, said, last=True)
        return NonFiniteOrigin("backward")

    def _of_sight(self, place: Literal["forward", "backward"], sight: Sight) -> NonFiniteOrigin:
        back = place == "backward"
        timestep, sample = sight.slices.first(self._layouts, self._samples, last=back)
        if back and getattr(sight.call.module, "bidirectional", False):
            timestep = sample = None  # one of the two directions ends at either end
        if sight.call.step is not None:
            timestep = sight.call.step
        tensor = "gradient of the input" if back else "output"
        return NonFiniteOrigin(place, sight.call.path, timestep, sample, tensor)

    def _described(
        self,
        place: Literal["batch", "forward", "backward"],
        path: str,
        slices: Slices,
        tensor: str,
        *,
        last: bool = False,
    ) -> NonFiniteOrigin:
        timestep, sample = slices.first(self._layouts, self._samples, last=last)
        return NonFiniteOrigin(place, path, timestep, sample, tensor)

    def _batch_is_to_blame(self) -> bool:
        tensors = [_tensor(value) for _, value in self._suspects]
        if any(0 in tensor.stride() for tensor in tensors if tensor.layout is torch.strided):
            return True  # of what is repeated without a copy no element can be changed
        with self._replay():
            with torch.no_grad():
                for tensor in tensors:
                    _mend(tensor)
            loss = self._compute(self._batch, self._batch_idx)
            return is_finite(loss) and not _bad_ones(
                self._parameters, gradients(loss, self._parameters)
            )


def _tensor(value: Tensor | PackedSequence) -> Tensor:
    return value.data if isinstance(value, PackedSequence) else value


def _leading_sizes(value: Tensor | PackedSequence) -> Sequence[int]:
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]
    return list(value.shape[:2])


def _mend(tensor: Tensor) -> None:
    """Put a value that the tensor has elsewhere in place of each that is not finite."""
    finite = tensor.isfinite()
    others = tensor[finite]
    value = others.median() if len(others) and not others.is_complex() else tensor.new_zeros(())
    tensor.masked_fill_(finite.logical_not(), value)


def _bad_ones(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> set[int]:
    """Ids of the parameters whose gradient is not finite."""
    pairs = zip(parameters, grads, strict=True)
    return {id(p) for p, grad in pairs if grad is not None and not is_finite(grad)}


def _kept_between_batches(module: nn.Module) -> Iterator[Tensor]:
    """Tensors in attributes of modules, as a hidden state that the next batch goes on from."""
    registered = ("_parameters", "_modules")
    for part in module.modules():
        values = {name: value for name, value in vars(part).items() if name not in registered}
        for value in values.values():
            yield from (_tensor(tensor) for _, tensor in tensors_of(value, objects=False))
