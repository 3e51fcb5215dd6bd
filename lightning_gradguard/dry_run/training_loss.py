"""The loss of one training step of a user's module, heard by no logger."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_LOG = ("log", "log_dict")

_MANUAL = (
    "loss must be given for {name}, whose automatic_optimization is False: its training_step takes "
    "optimizer steps itself; got None"
)
_NO_STEP = "loss must be given for {name}, which has no training_step(batch) of its own; got None"


def loss_function(
    module: nn.Module, loss: Callable[[nn.Module, Any], Tensor] | None
) -> Callable[[Any, int], Tensor]:
    """The function from a batch and its number to the loss.

    Args:
        module: The user's module.
        loss: Function of the module and a batch; ``None`` for the module's ``training_step``.

    Raises:
        ValueError: If there is neither, or the module takes its optimizer steps by itself.
    """
    if loss is not None:
        return lambda batch, index: _checked(loss(module, batch), "loss", index)
    step = _training_step(module)
    takes_index = _takes_index(step)

    def compute(batch: Any, index: int) -> Tensor:
        output = step(batch, index) if takes_index else step(batch)
        return _checked(output, "training_step", index)

    return compute


def _training_step(module: nn.Module) -> Callable[..., Any]:
    name = type(module).__name__
    step = getattr(module, "training_step", None)
    # The base class has one, which only warns that it should be overridden.
    home = str(getattr(step, "__module__", "")).partition(".")[0]
    if not callable(step) or home in ("lightning", "pytorch_lightning"):
        raise ValueError(_NO_STEP.format(name=name))
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(_MANUAL.format(name=name))
    found: Callable[..., Any] = step
    return found


def _takes_index(step: Callable[..., Any]) -> bool:
    """Whether it takes the number of the batch, by Lightning's own rule."""
    parameters = inspect.signature(step).parameters.values()
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return (
        any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
        or sum(parameter.kind in places for parameter in parameters) >= 2
    )


def _checked(output: Any, source: str, index: int) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    what = f"{source} must return a scalar tensor or a dict that has it as 'loss'"
    if not isinstance(loss, Tensor):
        raise ValueError(f"{what}, got {output!r} for batch {index}")  # noqa: TRY004 - as below
    if loss.numel() != 1:
        raise ValueError(f"{what}, got shape {tuple(loss.shape)} for batch {index}")
    if not loss.requires_grad:
        raise ValueError(
            f"{source} must return a loss that depends on a trainable parameter, got one without "
            f"a gradient for batch {index}"
        )
    return loss.reshape(())


@contextlib.contextmanager
def as_in_training(module: nn.Module) -> Iterator[None]:
    """In the precision of the module's trainer if it has one, but with nothing logged to it."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "automatic_optimization"):  # a LightningModule, whichever the package
                stack.enter_context(_without_log(part))
        # The property raises where there is none.
        trainers = (vars(part).get("_trainer") for part in module.modules())
        trainer = next((trainer for trainer in trainers if trainer is not None), None)
        if trainer is not None:
            stack.enter_context(_without_loggers(trainer))
            stack.enter_context(trainer.precision_plugin.train_step_context())
        if isinstance(module, DistributedDataParallel):
            # Its reducer would wait for a backward pass over all parameters.
            stack.enter_context(module.no_sync())
        # What it holds of weights that the step itself has changed must not outlive them.
        stack.callback(torch.clear_autocast_cache)
        yield


@contextlib.contextmanager
def _without_log(module: nn.Module) -> Iterator[None]:
    attributes = vars(module)
    before = {name: attributes[name] for name in _LOG if name in attributes}
    attributes.update(dict.fromkeys(_LOG, _ignore))
    try:
        yield
    finally:
        for name in _LOG:
            attributes.pop(name, None)
        attributes.update(before)


@contextlib.contextmanager
def _without_loggers(trainer: Any) -> Iterator[None]:
    loggers = trainer.loggers
    trainer.loggers = [Silence() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def _ignore(*arguments: Any, **settings: Any) -> None:
    """Take what would be logged."""


class Silence:
    """Stands for a logger and for all that can be reached from it, and does nothing."""

    def __getattr__(self, name: str) -> Silence:
        return self

    def __getitem__(self, key: Any) -> Silence:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **settings: Any) -> Silence:
        """Do nothing, and stand for the result too."""
        return self

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *error: object) -> None:
        pass
