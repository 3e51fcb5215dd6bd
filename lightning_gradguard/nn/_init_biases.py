"""Initializers of gate biases: how long the units of an LSTM or a GRU remember at first."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_gradguard._validation import check_number
from lightning_gradguard.nn._gates import RecurrentLayer, layers_of_kind

_GATED = ("an LSTM", "a GRU")

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def forget_bias_(module: _Module, value: float = 1.0) -> _Module:
    """Set the bias of an LSTM's forget gates to ``value`` and leave everything else as it is.

    A forget gate near 1 carries the cell, and the gradient to it, to the next step.

    Args:
        module: LSTM, see above.
        value: Sum of the two biases. Default: 1, as in Jozefowicz et al. 2015, "An empirical
            exploration of recurrent network architectures".

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If ``value`` is not finite, or the module is no LSTM or has no biases.

    Example:
        >>> lstm = forget_bias_(nn.LSTM(3, 2), 1.0)
        >>> (lstm.bias_ih_l0 + lstm.bias_hh_l0)[2:4].tolist()
        [1.0, 1.0]
    """
    check_number("value", value, above=-math.inf, below=math.inf)
    for layer in layers_of_kind(module, "forget_bias_", ("an LSTM",)):
        _set_bias(layer, "f", layer.biases[0].new_tensor(value))
    return module


@torch.no_grad()
def chrono_(module: _Module, t_max: float, *, generator: torch.Generator | None = None) -> _Module:
    """Spread the memory of the units over 2 to ``t_max`` steps (chrono initialization).

    Tallec & Ollivier 2018, "Can recurrent neural networks warp time?". A leaky unit that keeps the
    share σ(b) of its state forgets within 1 + eᵇ steps, so with u ~ U(1, t_max − 1)

        LSTM: b_f = log u, b_i = −b_f;    GRU: b_z = log u

    and every other bias is 0. The paper's gated unit takes in the share g and keeps 1 − g, hence
    its b_g = −log u; torch's z is the share that is *kept*, hence the other sign here.

    Args:
        module: LSTM or GRU, see above.
        t_max: Longest dependency to expect, in steps; the sequence length if it is not known.
        generator: Source of the numbers.

    Raises:
        TypeError: If ``t_max`` is not a number.
        ValueError: If ``t_max`` is not finite and above 2, or the module has no such gates or no
            biases.

    Example:
        >>> gru = chrono_(nn.GRU(3, 8), t_max=100)
        >>> kept = torch.sigmoid((gru.bias_ih_l0 + gru.bias_hh_l0)[8:16])
        >>> bool(((0.5 <= kept) & (kept <= 0.99)).all())
        True
    """
    check_number("t_max", t_max, above=2, below=math.inf)
    for layer in layers_of_kind(module, "chrono_", _GATED):
        for bias in layer.biases:
            bias.zero_()
        _set_retention(layer, _uniform(layer, 1.0, t_max - 1.0, generator).log())
    return module


@torch.no_grad()
def uniform_gate_(module: _Module, *, generator: torch.Generator | None = None) -> _Module:
    """Spread the gates that keep the state evenly over (1/H, 1 − 1/H).

    Gu et al. 2020, "Improving the gating mechanism of recurrent neural networks": like chrono, with
    a heavy tail of long memories, but without a length to know beforehand. With
    u ~ U(1/H, 1 − 1/H)

        LSTM: b_f = log(u / (1 − u)), b_i = −b_f;    GRU: b_z = log(u / (1 − u))

    where z is the gate that keeps the state, as in torch. The other biases stay as they are.

    Args:
        module: LSTM or GRU of at least two units, see above.
        generator: Source of the numbers.

    Raises:
        ValueError: If the module has no such gates, no biases, or fewer than two units.

    Example:
        >>> lstm = uniform_gate_(nn.LSTM(3, 4))
        >>> forget = torch.sigmoid((lstm.bias_ih_l0 + lstm.bias_hh_l0)[4:8])
        >>> bool(((0.2499 <= forget) & (forget <= 0.7501)).all())
        True
    """
    for layer in layers_of_kind(module, "uniform_gate_", _GATED):
        check_number("hidden_size", layer.hidden_size, at_least=2, integer=True)
        edge = 1 / layer.hidden_size
        _set_retention(layer, _uniform(layer, edge, 1 - edge, generator).logit())
    return module


def _set_bias(layer: RecurrentLayer, gate: str, value: Tensor) -> None:
    """Make the biases of a gate, which are added up, equal ``value`` together."""
    first, *others = (layer.blocks(bias)[gate] for bias in layer.biases)
    first.copy_(value)
    for other in others:
        other.zero_()


def _set_retention(layer: RecurrentLayer, logit: Tensor) -> None:
    """Set the gate that keeps the state, and an LSTM's input gate to the opposite."""
    if layer.kind == "an LSTM":
        _set_bias(layer, "f", logit)
        _set_bias(layer, "i", -logit)
    else:
        _set_bias(layer, "z", logit)


def _uniform(
    layer: RecurrentLayer, low: float, high: float, generator: torch.Generator | None
) -> Tensor:
    """One number per unit, in at least float32, as log and logit magnify what halves round off."""
    bias = layer.biases[0]
    dtype = torch.promote_types(bias.dtype, torch.float32)
    drawn = torch.empty(layer.hidden_size, device=bias.device, dtype=dtype)
    return drawn.uniform_(low, high, generator=generator)
