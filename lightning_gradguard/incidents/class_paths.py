"""Names of classes by which another process finds them again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def class_path(cls: type) -> str:
    """Where a class is defined, ``"package.module:Outer.Inner"``.

    Example:
        >>> class_path(Path)[-5:]
        ':Path'
    """
    return f"{cls.__module__}:{cls.__qualname__}"


def resolve(path: str, main: ModuleType | None = None) -> Any:
    """What a path names.

    Args:
        path: Module and name in it, ``"package.module:Name"``.
        main: Stands for ``__main__``, which was another script when the path was written.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If the module has no such name.

    Example:
        >>> resolve("collections:OrderedDict").__name__
        'OrderedDict'
    """
    module, _, name = path.partition(":")
    if module == "__main__" and main is not None:
        found: Any = main
    else:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def can_be_found(cls: type) -> bool:
    """Whether another process finds this very class under its path."""
    try:
        return resolve(class_path(cls)) is cls
    except (ImportError, AttributeError):
        return False


def importable_path(cls: type) -> str | None:
    """The path for an import in another process; ``None`` for a class made inside a function.

    A class of the script that runs is found under the script's own name.
    """
    if "<locals>" in cls.__qualname__:
        return None
    if cls.__module__ != "__main__":
        return class_path(cls)
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m package.module
        return f"{spec.name.removesuffix('.__main__')}:{cls.__qualname__}"
    file = getattr(main, "__file__", None)
    return f"{Path(file).stem}:{cls.__qualname__}" if file else None
