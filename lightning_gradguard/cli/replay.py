"""``gradguard replay``: do the step of an incident again."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gradguard.cli.command import Command, CommandError, in_one_line

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradguard.incidents import Incident


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", help="the incident, .../gradguard/incidents/412"
    )
    parser.add_argument(
        "--module",
        metavar="PKG.MOD:NAME",
        help="class of the model, or a function that makes it; default: the recorded class",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="take the weights from here, not from the incident",
    )
    parser.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(options: argparse.Namespace) -> None:
    from lightning_gradguard.incidents import read_incident, replay

    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        incident = read_incident(options.directory)
        module = _make(options.module or _recorded(incident), incident)
        if options.checkpoint:
            _load(options.checkpoint, module)
        result = replay(
            incident.directory, module, device=options.device, own_weights=bool(options.checkpoint)
        )
    except (ValueError, RuntimeError) as error:  # each says in a sentence what is wrong
        raise CommandError(in_one_line(error)) from error
    text = json.dumps(result.to_dict(), allow_nan=False) if options.json else str(result)
    print(text)  # noqa: T201 - this is its output


def _recorded(incident: Incident) -> str:
    path = incident.manifest["module"]["importable"]
    if path is None:
        cls = incident.manifest["module"]["class"]
        raise CommandError(
            f"--module must be given, since the recorded class {cls} cannot be imported"
        )
    print(f"gradguard: --module is not given, so {path} is used.", file=sys.stderr)  # noqa: T201
    return str(path)


def _make(path: str, incident: Incident) -> nn.Module:
    from torch import nn

    from lightning_gradguard.incidents.rebuild import decode

    make = _import(path)
    recorded = incident.manifest["module"]["hyperparameters"]
    hyperparameters = {name: decode(value, {}) for name, value in recorded.items()}
    arguments = _accepted(make, hyperparameters)
    try:
        module = make(**arguments)
    except Exception as error:
        given = ", ".join(arguments) or "no arguments"
        raise CommandError(
            f"{path} cannot be made with {given}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise CommandError(f"--module must make an nn.Module, got {type(module).__name__}: {path}")
    return module


def _import(path: str) -> Any:
    module, separator, name = path.partition(":")
    if not (module and separator and name):
        raise CommandError(f"--module must be of the form package.module:Name, got {path!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise CommandError(
            f"--module {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise CommandError(f"--module must be a class or a function, got {path!r}")
    return found


def _accepted(make: Any, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the class or function names; all if it takes any."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some that are written in C have none
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(hyperparameters)
    named = {
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return {name: value for name, value in hyperparameters.items() if name in named}


def _load(path: str, module: nn.Module) -> None:
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint.get("state_dict", checkpoint))
    except Exception as error:
        raise CommandError(f"--checkpoint {path} cannot be loaded: {in_one_line(error)}") from error


REPLAY = Command(
    name="replay",
    help="do the step of an incident again and name what was first not finite",
    description="Do the step of an incident again, and name the module, the timestep and the "
    "tensor that were first not finite. Imports the code of the model, and runs it.",
    example="gradguard replay logs/gradguard/incidents/412 --module models:Classifier",
    add_arguments=_add_arguments,
    run=_run,
)
