"""torch's own recurrent modules, with initializations, activations and residuals of their own.

Each is a subclass of the module that it is named after, with the same parameters, and where
nothing else is asked for it computes the same, bit for bit, with the same fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_gradguard._validation import check_choice, check_number
from lightning_gradguard.nn._fused import FusedLayers, Kernel
from lightning_gradguard.nn._scan import Cell, States
from lightning_gradguard.nn.equations import ElmanCell, GateWeights, GRUCell, LSTMCell
from lightning_gradguard.nn.init import forget_bias_

__all__ = ["GRU", "LSTM", "RNN"]

GatedInit = Literal["torch", "orthogonal", "chrono", "uniform", "xavier", "he"]
PlainInit = Literal["torch", "orthogonal", "xavier", "he", "identity"]
Nonlinearity = Literal["tanh", "relu", "leaky_relu", "prelu"]

# What torch.nn.LeakyReLU and torch.nn.PReLU start from.
_LEAK, _LEARNED_LEAK = 0.01, 0.25


class LSTM(FusedLayers, nn.LSTM):  # type: ignore[misc] # states are typed as of all three modules
    """``torch.nn.LSTM`` that can remember longer from the start, and that can be stacked deeper.

    Where the gradient vanishes through time, ``forget_bias`` and ``init`` let the cell keep its
    content; where it vanishes through layers, ``residual`` gives it a way around them. Everything
    else, shapes and parameter names included, is as of :class:`torch.nn.LSTM`; without
    ``residual`` so is every bit of the results.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether the gates have biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        proj_size: Features that the hidden state is projected to. Default 0: it is not.
        device: Of the parameters.
        dtype: Of the parameters.
        forget_bias: Bias of the forget gates. Default: as ``init`` says; 1 is what Jozefowicz et
            al. 2015 recommend.
        init: What :func:`~lightning_gradguard.nn.init.initialize` is told. Default: as torch does.
        t_max: Longest dependency to expect, for ``init="chrono"``.
        residual: Whether the input of each layer but the first is added to its output, as Wu et al.
            2016, "Google's neural machine translation system", do. Default ``False``.

    Attributes:
        recording: Where the next forward pass, then timestep by timestep, notes its states.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or contradicts another.

    Example:
        >>> lstm = LSTM(3, 8, num_layers=4, forget_bias=1.0, residual=True)
        >>> output, (h_n, c_n) = lstm(torch.randn(20, 2, 3))
        >>> output.shape, c_n.shape
        (torch.Size([20, 2, 8]), torch.Size([4, 2, 8]))
    """

    state_names: ClassVar[tuple[str, ...]] = ("h", "c")
    forget_bias: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
        init: GatedInit = "torch",
        t_max: float | None = None,
        residual: bool = False,
    ) -> None:
        if forget_bias is not None and init in ("chrono", "uniform"):
            raise ValueError(
                f"forget_bias must be left out with init={init!r}, which sets that bias itself, "
                f"got {forget_bias!r}"
            )
        if forget_bias is not None and not bias:
            raise ValueError(f"forget_bias must be left out with bias=False, got {forget_bias!r}")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_up(init, t_max, residual=residual)
        self.forget_bias = forget_bias
        if forget_bias is not None:
            forget_bias_(self, forget_bias)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as ``init`` and ``forget_bias`` say."""
        super().reset_parameters()
        if self.forget_bias is not None:
            forget_bias_(self, self.forget_bias)

    @property
    def _kernel(self) -> Kernel:
        return torch.lstm

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        gates = GateWeights.of(weights)
        return _ProjectedCell(gates, weights["weight_hr"]) if self.proj_size else LSTMCell(gates)

    def _own_defaults(self) -> dict[str, Any]:
        return {"forget_bias": None}


class GRU(FusedLayers, nn.GRU):  # type: ignore[misc] # states are typed as of all three modules
    """``torch.nn.GRU`` that can remember longer from the start, and that can be stacked deeper.

    See :class:`LSTM`, whose arguments these are, without ``proj_size`` and ``forget_bias``.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether the gates have biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        device: Of the parameters.
        dtype: Of the parameters.
        init: What :func:`~lightning_gradguard.nn.init.initialize` is told. Default: as torch does.
        t_max: Longest dependency to expect, for ``init="chrono"``.
        residual: Whether the input of each layer but the first is added to its output. Default
            ``False``.

    Attributes:
        recording: Where the next forward pass, then timestep by timestep, notes its states.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or contradicts another.

    Example:
        >>> gru = GRU(3, 8, init="chrono", t_max=100)
        >>> output, h_n = gru(torch.randn(100, 2, 3))
        >>> gru.load_state_dict(nn.GRU(3, 8).state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: GatedInit = "torch",
        t_max: float | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._set_up(init, t_max, residual=residual)

    @property
    def _kernel(self) -> Kernel:
        return torch.gru

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        return GRUCell(GateWeights.of(weights))


class RNN(FusedLayers, nn.RNN):  # type: ignore[misc] # states are typed as of all three modules
    r"""``torch.nn.RNN`` with leaky rectifiers too, and with the initializations that suit them.

    .. math:: h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    where φ is tanh, ReLU, leaky ReLU, or PReLU, whose slope below 0 each layer and direction learns
    (He et al. 2015, "Delving deep into rectifiers"; parameter ``slope_l0``, …). The leaky ones have
    no fused kernel: they run timestep by timestep.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        nonlinearity: What the state goes through. Default ``"tanh"``.
        bias: Whether there are biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        device: Of the parameters.
        dtype: Of the parameters.
        init: What :func:`~lightning_gradguard.nn.init.initialize` is told. Default: as torch does.
        negative_slope: Of the leaky ReLU below 0. Default 0.01, that of ``torch.nn.LeakyReLU``.
        residual: Whether the input of each layer but the first is added to its output. Default
            ``False``.

    Attributes:
        recording: Where the next forward pass, then timestep by timestep, notes its states.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or contradicts another.

    Example:
        >>> rnn = RNN(3, 8, nonlinearity="prelu", init="identity")
        >>> output, h_n = rnn(torch.randn(20, 2, 3))
        >>> rnn.slope_l0
        Parameter containing:
        tensor([0.2500], requires_grad=True)
    """

    negative_slope: float = _LEAK

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: PlainInit = "torch",
        negative_slope: float = _LEAK,
        residual: bool = False,
    ) -> None:
        check_choice("nonlinearity", nonlinearity, get_args(Nonlinearity))
        check_number("negative_slope", negative_slope, above=-math.inf, below=math.inf)
        if nonlinearity != "leaky_relu" and negative_slope != _LEAK:
            raise ValueError(
                f"negative_slope must be left out with nonlinearity={nonlinearity!r}, "
                f"got {negative_slope!r}"
            )
        super().__init__(
            input_size, hidden_size, num_layers, "tanh" if nonlinearity == "tanh" else "relu",
            bias, batch_first, dropout, bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        self.nonlinearity, self.negative_slope = nonlinearity, negative_slope
        if nonlinearity == "prelu":
            for part in range(num_layers * self._directions):
                slope = torch.full((1,), _LEARNED_LEAK, device=device, dtype=dtype)
                self.register_parameter(f"slope{self._suffix(part)}", nn.Parameter(slope))
        self._set_up(init, None, residual=residual)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as ``init`` says, and the slopes of a PReLU at 0.25."""
        super().reset_parameters()
        if self.nonlinearity == "prelu":
            for part in range(self.num_layers * self._directions):
                nn.init.constant_(self._weights(part)["slope"], _LEARNED_LEAK)

    @property
    def _names(self) -> list[str]:
        return [*super()._names, *(["slope"] if self.nonlinearity == "prelu" else [])]

    @property
    def _kernel(self) -> Kernel | None:
        return {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}.get(self.nonlinearity)

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        return ElmanCell(GateWeights.of(weights), self._activation(weights))

    def _activation(self, weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        if self.nonlinearity == "prelu":
            return partial(_prelu, slope=weights["slope"])
        if self.nonlinearity == "leaky_relu":
            return partial(functional.leaky_relu, negative_slope=self.negative_slope)
        return torch.tanh if self.nonlinearity == "tanh" else torch.relu

    def _own_defaults(self) -> dict[str, Any]:
        return {"nonlinearity": "tanh", "negative_slope": _LEAK}


@dataclass(frozen=True, eq=False)
class _ProjectedCell(LSTMCell):
    """An LSTM's equations with ``h_t = W_hr (o tanh(c_t))``."""

    weight_hr: Tensor

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        h_BH, c_BH = super().step(number, projected, states)
        return functional.linear(h_BH, self.weight_hr), c_BH


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return functional.prelu(x, slope.to(x.dtype))  # autocast leaves the slope as it is
