"""Initializers of recurrent modules, in place, on any module with torch's parameter names.

Each takes ``torch.nn.RNN``, ``LSTM``, ``GRU``, their cells, and any module that names its
parameters as they do (``weight_hh_l0``, ``bias_ih_l0_reverse``, ``weight_hh`` …), keeps its gates
in their order (i, f, g, o; r, z, n) and has a ``hidden_size`` H; also a module that contains such
modules, which are all initialized. It returns the module. ``bias_ih`` and ``bias_hh`` are added
up, so whatever sets a bias writes it to ``bias_ih`` and zero to ``bias_hh``. A ``generator`` must
be on the device of the parameters; without one, torch's global generator is used.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from lightning_gradguard._validation import check_choice
from lightning_gradguard.nn._gates import recurrent_layers
from lightning_gradguard.nn._init_biases import chrono_, forget_bias_, uniform_gate_
from lightning_gradguard.nn._init_weights import (
    Nonlinearity,
    he_,
    identity_recurrent_,
    orthogonal_recurrent_,
    torch_,
    xavier_,
)

__all__ = [
    "chrono_",
    "forget_bias_",
    "he_",
    "identity_recurrent_",
    "initialize",
    "orthogonal_recurrent_",
    "torch_",
    "uniform_gate_",
    "xavier_",
]

_GATED = ("torch", "orthogonal", "chrono", "uniform", "xavier", "he")
_NAMES = {
    "an Elman RNN": ("torch", "orthogonal", "xavier", "he", "identity"),
    "a GRU": _GATED,
    "an LSTM": _GATED,
}

_Module = TypeVar("_Module", bound=nn.Module)


def initialize(
    module: _Module,
    name: str,
    t_max: float | None = None,
    *,
    generator: torch.Generator | None = None,
) -> _Module:
    """Initialize a recurrent module by name; what the name does not set is drawn as torch does.

    Args:
        module: Recurrent module, see above.
        name: ``"torch"``, ``"orthogonal"``, ``"xavier"``, ``"he"`` (for the module's own
            ``nonlinearity``, tanh if it has none), and with gates ``"chrono"`` and ``"uniform"``,
            without gates ``"identity"``.
        t_max: For ``"chrono"`` only, see :func:`chrono_`.
        generator: Source of the numbers.

    Raises:
        TypeError: If ``t_max`` is not a number.
        ValueError: If ``name`` is none that a module of this kind can have, or ``t_max`` is missing
            where it is needed, given where it is not, or not above 2.

    Example:
        >>> lstm = initialize(nn.LSTM(3, 4), "chrono", t_max=50)
        >>> initialize(nn.RNN(3, 4), "chrono", t_max=50)
        Traceback (most recent call last):
        ...
        ValueError: init of an Elman RNN must be one of 'torch', 'orthogonal', 'xavier', 'he', \
'identity', got 'chrono'
    """
    _check(module, name, t_max)
    torch_(module, generator=generator)
    if name == "orthogonal":
        orthogonal_recurrent_(module, generator=generator)
    elif name == "identity":
        identity_recurrent_(module)
    elif name == "chrono" and t_max is not None:
        chrono_(module, t_max, generator=generator)
    elif name == "uniform":
        uniform_gate_(module, generator=generator)
    elif name == "xavier":
        xavier_(module, generator=generator)
    elif name == "he":
        _he_of(module, generator)
    return module


def _check(module: nn.Module, name: str, t_max: float | None) -> None:
    for layer in recurrent_layers(module):
        check_choice(f"init of {layer.kind}", name, _NAMES[layer.kind])
    if name == "chrono" and t_max is None:
        raise ValueError("t_max must be given with init='chrono': the longest dependency, in steps")
    if name != "chrono" and t_max is not None:
        raise ValueError(f"t_max must be left out with init={name!r}, got {t_max!r}")


def _he_of(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draw for the nonlinearity that the module itself has."""
    nonlinearity: Nonlinearity = getattr(module, "nonlinearity", "tanh")
    slope = getattr(module, "negative_slope", None) if nonlinearity == "leaky_relu" else None
    he_(module, nonlinearity, negative_slope=slope, generator=generator)
