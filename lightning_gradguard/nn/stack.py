"""Stacks of recurrent layers whose equations are not among torch's own.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``K`` layers times directions, ``H`` hidden.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from lightning_gradguard.nn._layers import Layers, State
from lightning_gradguard.nn._scan import Trace

__all__ = ["RecurrentStack", "State"]


class RecurrentStack(Layers):
    """Layers and directions as in torch's own recurrent modules, around a subclass's equations.

    Constructor, shapes, ``PackedSequence``, unbatched input, return values, gate order and names of
    the parameters are those of :class:`torch.nn.LSTM`. A subclass says which parameters a layer
    has, and makes a :class:`~lightning_gradguard.nn._scan.Cell` of them.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether the gates have biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        residual: Whether the input of each layer but the first is added to its output. Default
            ``False``.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        recording: Where the next forward pass notes its states, once; ``None`` for nowhere.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
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
        *,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # On no device, for its checks and their messages.
        nn.LSTM(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device="meta",
        )  # fmt: skip
        if not isinstance(residual, bool):
            raise TypeError(f"residual should be of type bool, got: {type(residual).__name__}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.residual = bidirectional, residual
        self.recording: Trace | None = None
        self._names: list[dict[str, str]] = []
        for layer in range(num_layers):
            features = input_size if layer == 0 else hidden_size * self._directions
            for way in ("", "_reverse")[: self._directions]:
                shapes = self._shapes(features)
                self._names.append({name: f"{name}_l{layer}{way}" for name in shapes})
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(self._names[-1][name], parameter)
        self.reset_parameters()

    @abstractmethod
    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        """Parameters of a layer with that many input features, by name, in torch's order."""

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as torch does: uniform in ± 1/√hidden_size."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _weights(self, part: int) -> dict[str, Tensor]:
        return {name: getattr(self, full) for name, full in self._names[part].items()}

    def extra_repr(self) -> str:
        """As of torch's own modules: what differs from the defaults."""
        words = [str(self.input_size), str(self.hidden_size)]
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
            "bidirectional": False, "residual": False, **self._own_defaults(),
        }  # fmt: skip
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                words.append(f"{name}={value!r}")
        return ", ".join(words)

    def _own_defaults(self) -> dict[str, object]:
        """Arguments that a subclass adds, with their defaults."""
        return {}
