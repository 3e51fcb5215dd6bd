"""Which outputs of an activation are inactive or saturated.

An activation is judged by its slope: where that is below a twentieth of its maximum, next to no
gradient passes. On the left tail of a rectifier that is called inactive; on the flat ends of a
bounded function, saturated. Whether an output lies there follows from the output itself, except
where two inputs share one (GELU and its like, whose left tail comes back to zero).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

Flat = Callable[[Any, Tensor], Tensor]

# Inputs below which the slope of these stays under a twentieth of its maximum.
_GELU_TAIL = -2.28
_SILU_TAIL = -3.93
_MISH_TAIL = -3.98
# Where the slope of tanh, one less its square, falls below a twentieth.
_TANH_END = 0.975
# Where the square of what softsign has left to its bound does.
_SOFTSIGN_END = 0.7764
# A value of softplus: its slope is a sigmoid.
_SOFTPLUS_TAIL = 0.0513
# As the share of the way to its lower bound that CELU has gone.
_CELU_TAIL = 0.95
_SELU_BOUND = 1.7580993408473766


@dataclass(frozen=True)
class ActivationKind:
    """What is known of one activation function.

    Attributes:
        name: In lower case.
        inactive: Of the module and its outputs (or inputs, see ``of_input``): where they are
            inactive, which NaN is not. ``None`` if it has no inactive side.
        saturated: Likewise, where it is saturated; ``None`` if it does not saturate.
        of_input: Whether it is decided by inputs.
    """

    name: str
    inactive: Flat | None = None
    saturated: Flat | None = None
    of_input: bool = False


# Functions and partial ones, no closures: a guard that has run can be pickled.
def _is_up_to(_: Any, x: Tensor, *, bound: float) -> Tensor:
    return x <= bound


def _up_to(bound: float) -> Flat:
    return partial(_is_up_to, bound=bound)


def _is_beyond(_: Any, y: Tensor, *, end: float) -> Tensor:
    return y.abs() > end


def _beyond(end: float) -> Flat:
    return partial(_is_beyond, end=end)


def _relu6_top(_: Any, y: Tensor) -> Tensor:
    return y >= 6.0


def _hardsigmoid_ends(_: Any, y: Tensor) -> Tensor:
    return (y <= 0.0) | (y >= 1.0)


def _at_bounds(module: Any, y: Tensor) -> Tensor:
    return (y <= float(module.min_val)) | (y >= float(module.max_val))


def _sigmoid_ends(_: Any, y: Tensor) -> Tensor:
    return (y - y * y) < 0.0125


def _elu_tail(module: Any, y: Tensor) -> Tensor:
    alpha = float(module.alpha)
    return y <= max(1.0, alpha) / 20 - alpha


def _celu_tail(module: Any, y: Tensor) -> Tensor:
    return y <= -_CELU_TAIL * float(module.alpha)


def _softplus_tail(module: Any, y: Tensor) -> Tensor:
    return y <= _SOFTPLUS_TAIL / float(module.beta)


RELU = ActivationKind("relu", inactive=_up_to(0.0))
TANH = ActivationKind("tanh", saturated=_beyond(_TANH_END))
_GELU = ActivationKind("gelu", inactive=_up_to(_GELU_TAIL), of_input=True)
_SILU = ActivationKind("silu", inactive=_up_to(_SILU_TAIL), of_input=True)

_KINDS: dict[str, ActivationKind] = {
    "ReLU": RELU,
    "ReLU6": ActivationKind("relu6", inactive=_up_to(0.0), saturated=_relu6_top),
    "GELU": _GELU,
    "SiLU": _SILU,
    "Mish": ActivationKind("mish", inactive=_up_to(_MISH_TAIL), of_input=True),
    "Hardswish": ActivationKind("hardswish", inactive=_up_to(-3.0), of_input=True),
    "ELU": ActivationKind("elu", inactive=_elu_tail),
    "CELU": ActivationKind("celu", inactive=_celu_tail),
    "SELU": ActivationKind("selu", inactive=_up_to(-_CELU_TAIL * _SELU_BOUND)),
    "Softplus": ActivationKind("softplus", inactive=_softplus_tail),
    "Tanh": TANH,
    "Hardtanh": ActivationKind("hardtanh", saturated=_at_bounds),
    "Sigmoid": ActivationKind("sigmoid", saturated=_sigmoid_ends),
    "Hardsigmoid": ActivationKind("hardsigmoid", saturated=_hardsigmoid_ends),
    "Softsign": ActivationKind("softsign", saturated=_beyond(_SOFTSIGN_END)),
}
# Of the transformers package, whose modules compute the same under names of their own.
_NAMESAKES: dict[str, ActivationKind] = {
    **dict.fromkeys(
        ("GELUActivation", "NewGELUActivation", "FastGELUActivation", "PytorchGELUTanh"), _GELU
    ),
    "SiLUActivation": _SILU,
}


def activation_kind(module: nn.Module) -> ActivationKind | None:
    """What is known of ``module`` as an activation, if anything.

    A subclass counts as what it derives from. Functions without a flat side (leaky ReLUs) have no
    kind.

    Example:
        >>> activation_kind(nn.ReLU()).name
        'relu'
        >>> activation_kind(nn.LeakyReLU()) is None
        True
    """
    for base in type(module).__mro__:
        kind = _NAMESAKES.get(base.__name__)
        if base.__module__.startswith("torch.nn.modules."):
            kind = _KINDS.get(base.__name__)
        if kind is not None:
            return kind
    return None
