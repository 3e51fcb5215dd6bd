"""Which layer a parameter belongs to, read from its name alone."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_gradguard._validation import check_number

# Modules that wrap another one under this attribute without being a layer of the user's model.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def clean_name(name: str) -> str:
    """Return a parameter's name without the components that wrappers add.

    ``torch.compile``, activation checkpointing and FSDP insert a component of their own, so that
    the same model would report other metric keys once it is wrapped.

    Args:
        name: Dotted name as ``named_parameters`` gives it.

    Example:
        >>> clean_name("_orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in _WRAPPERS] + [last])


def layer_index(names: Iterable[str], depth: int | None = None) -> tuple[list[str], list[int]]:
    """Group parameters by the module that owns them.

    A layer is the module path of its parameters, cut to ``depth`` components. A parameter of the
    root module has no path and is a layer of its own, under its own name. A parametrized tensor
    (``rnn.parametrizations.weight_hh_l0.original``) counts to the module it parametrizes (``rnn``).

    Args:
        names: Dotted parameter names.
        depth: Number of leading path components to keep, at least 1. Default: all of them.

    Returns:
        The layers in order of first appearance, and for each name the number of its layer.

    Raises:
        TypeError: If ``depth`` is neither an integer nor ``None``.
        ValueError: If ``depth`` is less than 1.

    Example:
        >>> layer_index(["encoder.rnn.weight_ih_l0", "encoder.rnn.bias_ih_l0", "head.weight"])
        (['encoder.rnn', 'head'], [0, 0, 1])
        >>> layer_index(["encoder.rnn.weight_ih_l0", "encoder.proj.weight", "scale"], depth=1)
        (['encoder', 'scale'], [0, 0, 1])
    """
    if depth is not None:
        check_number("depth", depth, at_least=1, integer=True)
    groups: dict[str, int] = {}
    numbers = [groups.setdefault(_layer(name, depth), len(groups)) for name in names]
    return list(groups), numbers


def _layer(name: str, depth: int | None) -> str:
    parts = clean_name(name).split(".")
    if "parametrizations" in parts[:-1]:
        at = parts.index("parametrizations")
        parts = [*parts[:at], parts[at + 1]]
    return ".".join((parts[:-1] or parts)[:depth])
