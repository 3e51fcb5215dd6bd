"""Initializers of recurrent weights, each gate by itself."""

from __future__ import annotations

import math
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_gradguard._validation import check_choice, check_number
from lightning_gradguard.nn._gates import RecurrentLayer, layers_of_kind, recurrent_layers

# Slopes that the modules of torch start from.
_SLOPES = {"leaky_relu": 0.01, "prelu": 0.25}

Nonlinearity = Literal["linear", "sigmoid", "tanh", "relu", "leaky_relu", "prelu", "selu"]

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def torch_(module: _Module, *, generator: torch.Generator | None = None) -> _Module:
    """Draw every recurrent weight and bias from U(−1/√H, 1/√H), as torch does by default.

    Parameters with other names, as those of a normalization, stay as they are. With the same seed
    the values are those of ``reset_parameters()`` of ``torch.nn.LSTM``, ``GRU`` and ``RNN``.

    Args:
        module: Recurrent module, see above.
        generator: Source of the numbers.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If it has no recurrent parameters.

    Example:
        >>> gru = torch_(nn.GRU(3, 16))
        >>> bool(gru.weight_hh_l0.abs().max() <= 0.25)
        True
    """
    for layer in recurrent_layers(module):
        bound = 1 / math.sqrt(layer.hidden_size)
        for parameter in layer.parameters:
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return module


@torch.no_grad()
def orthogonal_recurrent_(
    module: _Module, gain: float = 1.0, *, generator: torch.Generator | None = None
) -> _Module:
    """Make the recurrent matrix of every gate orthogonal, times ``gain``.

    Saxe et al. 2014, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks": all singular values are equal, so no direction of the state starts out fading. With a
    projection the blocks of shape (H, P) and the projection itself, (P, H), are semi-orthogonal,
    the projection without the gain. Input weights, biases and the ``weight_sh`` of a
    ``TemporalSkipRNN``, with which the state would grow, stay as they are.

    Args:
        module: Recurrent module, see above.
        gain: What every singular value is set to.
        generator: Source of the numbers.

    Raises:
        TypeError: If ``gain`` is not a number.
        ValueError: If ``gain`` is not finite and above 0, or there are no recurrent parameters.

    Example:
        >>> gru = orthogonal_recurrent_(nn.GRU(3, 4))
        >>> reset = gru.weight_hh_l0[:4]
        >>> torch.allclose(reset @ reset.T, torch.eye(4), atol=1e-6)
        True
    """
    check_number("gain", gain, above=0, below=math.inf)
    for layer in recurrent_layers(module):
        for block in layer.blocks(layer.weight_hh).values():
            _orthogonal(block, gain, generator)
        if layer.weight_hr is not None:
            _orthogonal(layer.weight_hr, 1.0, generator)
    return module


@torch.no_grad()
def identity_recurrent_(module: _Module, scale: float = 1.0) -> _Module:
    """Set the recurrent matrix of an Elman RNN to ``scale`` times the identity, its biases to 0.

    Le et al. 2015, "A simple way to initialize recurrent networks of rectified linear units": with
    ReLU the state, and the gradient, stay as they are until an input changes them. Input weights
    stay as they are.

    Args:
        module: Elman RNN with ReLU, leaky ReLU or PReLU, see above.
        scale: Default: 1, the paper's IRNN; it takes 0.01 where memories need not be long.

    Raises:
        TypeError: If ``scale`` is not a number.
        ValueError: If ``scale`` is not finite, or the module has gates.

    Example:
        >>> rnn = identity_recurrent_(nn.RNN(3, 2, nonlinearity="relu"))
        >>> rnn.weight_hh_l0.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    check_number("scale", scale, above=-math.inf, below=math.inf)
    for layer in layers_of_kind(module, "identity_recurrent_", ("an Elman RNN",), bias=False):
        nn.init.eye_(layer.weight_hh).mul_(scale)
        for bias in layer.biases:
            bias.zero_()
    return module


@torch.no_grad()
def xavier_(module: _Module, *, generator: torch.Generator | None = None) -> _Module:
    """Draw every gate's matrices from U(−√(6 / (fan_in + fan_out)), +…) and set biases to 0.

    Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural
    networks". The fans are those of one gate's block: of the stacked matrix, whose fan_out is three
    or four times too large, they would make the weights too small.

    Args:
        module: Recurrent module, see above.
        generator: Source of the numbers.

    Raises:
        ValueError: If there are no recurrent parameters.

    Example:
        >>> lstm = xavier_(nn.LSTM(8, 4))
        >>> bool(lstm.weight_ih_l0.abs().max() <= (6 / (8 + 4)) ** 0.5)
        True
    """
    for layer in recurrent_layers(module):
        for block in _matrices(layer):
            nn.init.xavier_uniform_(block, generator=generator)
        for bias in layer.biases:
            bias.zero_()
    return module


@torch.no_grad()
def he_(
    module: _Module,
    nonlinearity: Nonlinearity = "relu",
    *,
    negative_slope: float | None = None,
    generator: torch.Generator | None = None,
) -> _Module:
    """Draw every gate's matrices from N(0, gain² / fan_in) and set biases to 0.

    He et al. 2015, "Delving deep into rectifiers". The gain is that of
    ``torch.nn.init.calculate_gain``, √2 for ReLU. A projection, which nothing follows, has gain 1.

    Args:
        module: Recurrent module, see above.
        nonlinearity: What the state goes through.
        negative_slope: Slope of a leaky ReLU or PReLU below 0. Default: what ``torch.nn.LeakyReLU``
            and ``torch.nn.PReLU`` start from, 0.01 and 0.25.
        generator: Source of the numbers.

    Raises:
        TypeError: If ``negative_slope`` is not a number.
        ValueError: If ``nonlinearity`` is none of those, ``negative_slope`` is not finite or given
            without need, or there are no recurrent parameters.

    Example:
        >>> rnn = he_(nn.RNN(3, 256, nonlinearity="relu"))
        >>> abs(rnn.weight_hh_l0.std().item() / (2 / 256) ** 0.5 - 1) < 0.05
        True
    """
    gain = _gain(nonlinearity, negative_slope)
    for layer in recurrent_layers(module):
        for block in _matrices(layer):
            own = 1.0 if block is layer.weight_hr else gain
            block.normal_(0.0, own / math.sqrt(block.shape[1]), generator=generator)
        for bias in layer.biases:
            bias.zero_()
    return module


def _gain(nonlinearity: Nonlinearity, negative_slope: float | None) -> float:
    check_choice("nonlinearity", nonlinearity, get_args(Nonlinearity))
    if negative_slope is None:
        negative_slope = _SLOPES.get(nonlinearity)
    elif nonlinearity not in _SLOPES:
        raise ValueError(
            f"negative_slope must be left out with nonlinearity={nonlinearity!r}, "
            f"got {negative_slope!r}"
        )
    else:
        check_number("negative_slope", negative_slope, above=-math.inf, below=math.inf)
    # A PReLU is a leaky ReLU that learns its slope.
    named = "leaky_relu" if nonlinearity == "prelu" else nonlinearity
    return nn.init.calculate_gain(named, negative_slope)


def _matrices(layer: RecurrentLayer) -> list[Tensor]:
    """The matrices of each gate, and the projection."""
    stacked = [w for w in (layer.weight_ih, layer.weight_hh, layer.weight_sh) if w is not None]
    blocks = [block for weight in stacked for block in layer.blocks(weight).values()]
    return blocks if layer.weight_hr is None else [*blocks, layer.weight_hr]


def _orthogonal(block: Tensor, gain: float, generator: torch.Generator | None) -> None:
    # There is no QR decomposition of halves.
    dtype = torch.promote_types(block.dtype, torch.float32)
    drawn = torch.empty(block.shape, device=block.device, dtype=dtype)
    block.copy_(nn.init.orthogonal_(drawn, gain, generator=generator))
