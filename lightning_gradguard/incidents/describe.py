"""What has to be known of a model and its surroundings to do a step again."""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from torch import nn

import lightning_gradguard
from lightning_gradguard.incidents.class_paths import class_path, importable_path
from lightning_gradguard.incidents.structure import encode
from lightning_gradguard.measure import clean_name

_PACKAGES = ("torch", "lightning", "pytorch_lightning", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, this package and those in use that matter.

    Example:
        >>> versions()["gradguard"] == lightning_gradguard.__version__
        True
    """
    found = {"python": platform.python_version(), "gradguard": lightning_gradguard.__version__}
    for name in _PACKAGES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    if "pytorch_lightning" in found:  # of its two names, whichever is in use
        found.setdefault("lightning", found.pop("pytorch_lightning"))
    return found


def describe(module: nn.Module) -> dict[str, Any]:
    """Class, hyperparameters and modes of a model, as plain values.

    Example:
        >>> describe(nn.Sequential(nn.Dropout().eval()))["evaluating"]
        ['0']
    """
    hyperparameters, left_out = _hyperparameters(module)
    return {
        "class": class_path(type(module)),
        "importable": importable_path(type(module)),
        "hyperparameters": hyperparameters,
        "hyperparameters_left_out": left_out,
        "evaluating": [
            clean_name(name)
            for name, part in module.named_modules()
            if module.training and not part.training
        ],
        "frozen": [clean_name(n) for n, p in module.named_parameters() if not p.requires_grad],
    }


def _hyperparameters(module: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Those of a LightningModule that are plain values, and the names of the others."""
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    given: Any = getattr(module, "hparams", None)
    for name, value in given.items() if isinstance(given, Mapping) else ():
        encoded = encode(value, str(name))
        if encoded.problems or encoded.tensors:
            left_out.append(str(name))
        else:
            kept[str(name)] = encoded.structure
    return kept, left_out


def describe_exception(exception: BaseException | None) -> dict[str, str] | None:
    """Type, message and traceback of an exception."""
    if exception is None:
        return None
    lines = traceback.format_exception(type(exception), exception, exception.__traceback__)
    return {
        "type": class_path(type(exception)),
        "message": str(exception),
        "traceback": "".join(lines),
    }
