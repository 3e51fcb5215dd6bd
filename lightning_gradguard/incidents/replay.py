"""Do the step of an incident again, and see where it goes wrong."""

from __future__ import annotations

import contextlib
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradguard._validation import check_type
from lightning_gradguard.dry_run.alone import alone
from lightning_gradguard.dry_run.backward import gradients
from lightning_gradguard.dry_run.finite import is_finite
from lightning_gradguard.dry_run.non_finite import locate_non_finite
from lightning_gradguard.dry_run.training_loss import as_in_training, loss_function
from lightning_gradguard.dry_run.untouched import untouched
from lightning_gradguard.incidents.past_run import (
    PastTrainer,
    attach,
    in_precision,
    knows_precision,
    set_modes,
)
from lightning_gradguard.incidents.reader import Incident, read_incident
from lightning_gradguard.incidents.replay_result import Replay
from lightning_gradguard.incidents.structure import ON_HOST
from lightning_gradguard.incidents.weights import differing, put
from lightning_gradguard.measure import clean_name
from lightning_gradguard.readings import NonFiniteOrigin

_LARGEST = 3

_Loss = Callable[[nn.Module, Any], Tensor]


def replay(
    directory: str | Path,
    module: nn.Module,
    *,
    loss: _Loss | None = None,
    device: str | torch.device = "cpu",
    own_weights: bool = False,
) -> Replay:
    """Run the loss and the backward pass of an incident again, with hooks on every module.

    With the weights, the batch, the random numbers and the precision of the step, and its modules
    in the modes they were in. The module and all random numbers are left as they were found.
    Modules in which classes of the batch are defined are imported, and with them their code runs.

    What a model keeps in plain attributes from batch to batch, as a hidden state, is not in an
    incident, nor is what a training step has changed in its batch undone.

    Args:
        directory: Directory of the incident.
        module: A model like that of the run: a LightningModule, or any module if ``loss`` is given.
        loss: Returns the loss of a batch. Default: ``module.training_step(batch, batch_idx)``.
        device: Where to run. Default: the CPU.
        own_weights: Whether to use the module's own weights in place of the incident's. Default
            ``False``. Without weights in the incident its own are used in any case.

    Raises:
        IncidentError: If the incident is not whole or cannot be replayed, or its weights are those
            of another model.
        TypeError: If an argument has the wrong type.
        ValueError: If there is no loss, as for modules that optimize manually.

    Example:
        >>> import tempfile
        >>> from lightning_gradguard.incidents import IncidentWriter, Moment, RandomState
        >>> model, batch = nn.Linear(3, 1), torch.ones(4, 3)
        >>> batch[2, 0] = float("nan")
        >>> moment = Moment(batch, 0, RandomState.now(torch.device("cpu")))
        >>> draft = IncidentWriter(Path(tempfile.mkdtemp())).begin(7, model, moment)
        >>> result = replay(
        ...     draft.commit("non_finite"), model, loss=lambda model, x: model(x).sum()
        ... )
        >>> result.origin
        NonFiniteOrigin(place='batch', module='', timestep=None, sample=2)
    """
    check_type("module", module, nn.Module, "an nn.Module")
    check_type("own_weights", own_weights, bool, "True or False")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of a module and a batch, or None, got {loss!r}")
    device = torch.device(device)
    loss_function(module, loss)  # says at once if there is none
    incident = read_incident(directory)
    batch = _batch(incident, module, device)
    again = _Again(incident, module, batch, loss, device)
    if device.type == "cuda":
        torch.cuda.init()  # else the state of its generators would not be kept
    with untouched(module):
        module.to(device)
        notes = _put_weights(incident, module, own_weights=own_weights)
        notes += _differences(incident, device)
        set_modes(module, incident.manifest["module"])
        attach(module, PastTrainer(incident.manifest["facts"]))
        return again.result(notes)


def _batch(incident: Incident, module: nn.Module, device: torch.device) -> Any:
    model_on = incident.manifest["facts"].get("device", "cpu")

    def place(tensor: Tensor, was_on: str) -> Tensor:
        # What was not with the model stays where it was.
        moves = was_on == model_on and was_on != ON_HOST
        return tensor.to(device) if moves else tensor

    return incident.batch(place, sys.modules.get(type(module).__module__))


def _put_weights(incident: Incident, module: nn.Module, *, own_weights: bool) -> list[str]:
    """Give the module the weights of the step; returns what is to be said of them."""
    told = incident.manifest["weights"]
    if own_weights:
        return ["The weights are the module's own, as was asked for."]
    if not incident.has_weights:
        return [_of_fingerprint(module, told)]
    weights = incident.weights()
    later = told["step"] - incident.step
    steps = "1 step" if later == 1 else f"{later} steps"
    if later <= 0:
        put(module, weights)
        return []
    after = f"The weights of the incident are those of {steps} later"
    if incident.manifest["facts"].get("rolled_back"):
        after += ", when the run had gone back to earlier ones"
    # Minus infinity may be a mask among the buffers.
    if all(is_finite(value, mask=True) for value in weights.values()):
        put(module, weights)
        return [f"{after}, so the numbers are not quite those of the step."]
    return [f"{after} and no longer finite, so the module's own were used."]


def _of_fingerprint(module: nn.Module, told: dict[str, Any]) -> str:
    start = f"The incident has no weights, since {told['why_not']}; the module's own"
    known = told["fingerprint"]
    if not known:
        return f"{start} were used."
    others = differing(module, known)
    if not others:
        return f"{start} are the same."
    return (
        f"{start} are others ({len(others)} of {len(known)} tensors, first `{others[0]}`), so this "
        "may not be what happened."
    )


def _differences(incident: Incident, device: torch.device) -> list[str]:
    facts = incident.manifest["facts"]
    precision, ran_on = str(facts.get("precision", "")), facts.get("device", "cpu")
    notes = []
    if not knows_precision(precision):
        notes.append(f"The run was in precision {precision!r}, this is in that of the weights.")
    if ran_on != device.type:
        notes.append(
            f"The run was on {ran_on} and this on {device.type}, so random numbers and roundings "
            "are others."
        )
    return notes


class _Again:
    """Does the step, once to look for its origin and once for its numbers."""

    def __init__(
        self,
        incident: Incident,
        module: nn.Module,
        batch: Any,
        loss: _Loss | None,
        device: torch.device,
    ) -> None:
        self._incident = incident
        self._module = module
        self._batch = batch
        self._loss = loss
        self._device = device
        self._batch_idx = int(incident.manifest["facts"]["batch_idx"])
        self._random = incident.random_state()

    def result(self, notes: Sequence[str]) -> Replay:
        origin: NonFiniteOrigin | None = None
        layers: tuple[tuple[str, float], ...] = ()
        loss, total, error = math.nan, math.nan, ""
        with _Running(self._module) as running:
            try:
                with self._surroundings():
                    loss, total, layers = self._numbers()
                if not (math.isfinite(loss) and math.isfinite(total)):
                    with self._surroundings():
                        origin = self._origin()
            except Exception as exception:  # noqa: BLE001 - what a user's code raises is the result
                error = _error(exception, running.path)
        return Replay(self._incident, origin, loss, total, layers, error, tuple(notes))

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        self._random.set(self._device)
        precision = str(self._incident.manifest["facts"].get("precision", ""))
        with in_precision(precision, self._device):
            yield

    def _origin(self) -> NonFiniteOrigin | None:
        return locate_non_finite(
            self._module, self._batch, loss=self._loss, batch_idx=self._batch_idx
        )

    def _numbers(self) -> tuple[float, float, tuple[tuple[str, float], ...]]:
        named = [(n, p) for n, p in self._module.named_parameters() if p.requires_grad]
        compute = loss_function(self._module, self._loss)
        with (
            untouched(self._module, self._batch),
            torch.inference_mode(False),
            as_in_training(self._module),
            alone(self._module),
        ):
            loss = compute(self._batch, self._batch_idx)
            grads = gradients(loss, [parameter for _, parameter in named])
            norms: dict[str, float] = {}
            for (name, _), grad in zip(named, grads, strict=True):
                if grad is not None:
                    layer = clean_name(name).rpartition(".")[0]
                    norms[layer] = math.hypot(norms.get(layer, 0.0), _norm(grad))
            largest = sorted(norms.items(), key=lambda item: -item[1])[:_LARGEST]
            return loss.item(), math.hypot(*norms.values()), tuple(largest)


def _norm(tensor: Tensor) -> float:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    values = torch.view_as_real(values) if values.is_complex() else values
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    norm: float = torch.linalg.vector_norm(values, dtype=dtype).item()
    return norm


class _Running:
    """Knows which module is running: the deepest, when an exception ends the forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self._stack: list[str] = []
        self._handles: list[RemovableHandle] = []
        for name, part in module.named_modules():
            if not isinstance(part, torch.jit.ScriptModule):
                path = clean_name(name)
                self._handles += [
                    part.register_forward_pre_hook(partial(self._enter, path)),
                    part.register_forward_hook(partial(self._leave, path)),
                ]

    @property
    def path(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _enter(self, path: str, *_: Any) -> None:
        self._stack.append(path)

    def _leave(self, path: str, *_: Any) -> None:
        # Calls inside it that an exception has ended, which its code has caught, had no end.
        while self._stack and self._stack.pop() != path:
            pass

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _error(exception: Exception, path: str) -> str:
    last = traceback.extract_tb(exception.__traceback__)[-1]
    place = f", in `{path}`" if path else ""
    said = " ".join(f"{type(exception).__name__}: {exception}".split())
    return f"{said} ({Path(last.filename).name}, line {last.lineno}{place})"
