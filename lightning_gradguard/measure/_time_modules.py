"""Which modules of a model are watched along time, found by their type or by their name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from lightning_gradguard._validation import check_type
from lightning_gradguard.measure._layers import clean_name
from lightning_gradguard.measure._traced_calls import records

_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_FUSED = (nn.RNN, nn.LSTM, nn.GRU)
_ATTENTION = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
_KNOWN = frozenset(kind.__name__ for kind in (*_CELLS, *_FUSED, *_ATTENTION))


@dataclass(frozen=True, eq=False)
class TimeModule:
    """A module to watch.

    Attributes:
        name: Its path in the model; the name of its type if it is the model itself.
        module: The module.
        way: How it is watched: as a fused recurrent module, as one that notes its states, as a
            cell, or on its output.
        axis: Time axis of its output, if it is watched there; ``None`` if that follows from the
            module (its ``batch_first``).
    """

    name: str
    module: nn.Module
    way: Literal["recurrent", "traced", "cell", "output"]
    axis: int | None = None


def find_time_modules(
    model: nn.Module,
    modules: str | Sequence[str] | Mapping[str, int],
    parameters: Collection[nn.Parameter] | None,
) -> tuple[list[TimeModule], dict[str, str]]:
    """Find the modules to watch, and say which cannot be, and why.

    Args:
        model: Where to search.
        modules: ``"auto"``, names or patterns, or a mapping of them to time axes.
        parameters: Watch only modules that own one of these; ``None``: those that own one that
            requires grad.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name matches nothing, or only modules without a known time axis.
    """
    check_type("model", model, nn.Module, "an nn.Module")
    named = _names(model)
    wanted = None if parameters is None else {id(parameter) for parameter in parameters}
    found: dict[int, TimeModule] = {}
    unwatched: dict[str, str] = {}
    for name, module, axis in _chosen(named, modules):
        if not _owns(module, wanted):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            unwatched[name] = f"{name!r} is a TorchScript module, which calls no hook in training"
            continue
        found.setdefault(id(module), _time_module(name, module, axis))
    return list(found.values()), unwatched


def _names(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules under all of their names; the wrapper of a compiled module is left out."""
    named: dict[str, nn.Module] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        # As parameter names are cleaned; the last component of those is never a wrapper.
        name = clean_name(f"{raw}.").rstrip(".")
        # Inside come later, and are what the wrapper stands for.
        named[name or _kind_of(model) or type(model).__name__] = module
    return list(named.items())


def _chosen(
    named: list[tuple[str, nn.Module]], modules: str | Sequence[str] | Mapping[str, int]
) -> Iterator[tuple[str, nn.Module, int | None]]:
    if isinstance(modules, str):
        if modules != "auto":
            raise ValueError(
                f"modules must be 'auto', a sequence of names or a mapping, got {modules!r}"
            )
        yield from _automatic(named)
    elif isinstance(modules, Mapping):
        for pattern, axis in modules.items():
            _check_axis(pattern, axis)
            yield from ((n, m, axis) for n, m in _matches(named, pattern))
    elif isinstance(modules, Sequence):
        for pattern in modules:
            yield from _with_known_axis(named, pattern)
    else:
        raise TypeError(
            f"modules must be 'auto', a sequence of names or a mapping, got {modules!r}"
        )


def _automatic(
    named: list[tuple[str, nn.Module]],
) -> Iterator[tuple[str, nn.Module, int | None]]:
    """The modules whose type is known; of attention only the outermost."""
    inside: set[int] = set()
    for name, module in named:
        kind = _kind_of(module)
        if kind is None or id(module) in inside:
            continue
        if kind in {attention.__name__ for attention in _ATTENTION}:
            inside.update(id(part) for part in module.modules() if part is not module)
        yield name, module, None


def _kind_of(module: nn.Module) -> str | None:
    """Name of the known type that ``module`` is of, also if it was compiled to TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return original if original in _KNOWN else None
    if records(module):
        return type(module).__name__
    known = (kind for kind in (*_CELLS, *_FUSED, *_ATTENTION) if isinstance(module, kind))
    return next((kind.__name__ for kind in known), None)


def _matches(named: list[tuple[str, nn.Module]], pattern: str) -> list[tuple[str, nn.Module]]:
    check_type("a name in modules", pattern, str, "a string")
    matches = [(name, module) for name, module in named if fnmatchcase(name, pattern)]
    if not matches:
        nearest = get_close_matches(pattern, [name for name, _ in named], n=3, cutoff=0.0)
        raise ValueError(
            f"modules must name modules of the model, got {pattern!r}, which matches none; "
            f"nearest: {', '.join(map(repr, nearest))}"
        )
    return matches


def _with_known_axis(
    named: list[tuple[str, nn.Module]], pattern: str
) -> Iterator[tuple[str, nn.Module, int | None]]:
    matches = _matches(named, pattern)
    known = [(name, module) for name, module in matches if _kind_of(module) is not None]
    if not known:
        name, module = matches[0]
        raise ValueError(
            f"modules must give the time axis of {name!r} ({type(module).__name__}), which is not "
            f"known, as in {{{name!r}: 1}}; got {pattern!r}"
        )
    yield from ((name, module, None) for name, module in known)


def _check_axis(pattern: str, axis: object) -> None:
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"the time axis of {pattern!r} in modules must be an integer, got {axis!r}")


def _owns(module: nn.Module, wanted: set[int] | None) -> bool:
    if wanted is None:
        return any(parameter.requires_grad for parameter in module.parameters())
    return any(id(parameter) in wanted for parameter in module.parameters())


def _time_module(name: str, module: nn.Module, axis: int | None) -> TimeModule:
    if isinstance(module, _CELLS):
        if axis is not None:
            raise ValueError(
                f"modules must not give a time axis for {name!r} ({type(module).__name__}): each "
                f"of its calls is one timestep; got {axis}"
            )
        return TimeModule(name, module, "cell")
    if isinstance(module, _FUSED) or records(module):
        expected = 1 if module.batch_first else 0
        if axis not in (None, expected, expected - 3):
            raise ValueError(
                f"the time axis of {name!r} in modules must be {expected}, as its batch_first is "
                f"{module.batch_first}, got {axis}"
            )
        return TimeModule(name, module, "traced" if records(module) else "recurrent")
    return TimeModule(name, module, "output", axis)
