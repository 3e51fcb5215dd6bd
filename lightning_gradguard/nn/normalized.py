"""LSTM and GRU with layer normalization inside the recurrence, recurrent dropout and zoneout.

Shape suffixes: ``T`` time, ``B`` batch, ``H`` hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.nn._layer_norm_cells import LayerNormGRUCell, LayerNormLSTMCell
from lightning_gradguard.nn._noise import RecurrentNoise, Zoneout, zoneout_pair
from lightning_gradguard.nn._scan import Cell
from lightning_gradguard.nn.equations import GateWeights
from lightning_gradguard.nn.stack import RecurrentStack


class NormalizedStack(RecurrentStack):
    """Recurrent layers that normalize what goes into their gates.

    Normalization makes the spread of the gates' inputs independent of the matrices, and takes their
    mean away, so that a bias is all that decides how open a gate is at first: biases and shifts
    begin at zero, except that of a forget gate, which begins at one. At zero a forget gate would
    halve c, and the gradient through it, at every timestep (Jozefowicz et al. 2015).
    """

    _initial_gain: ClassVar[float] = 1.0
    _has_forget_gate: ClassVar[bool] = False

    def reset_parameters(self) -> None:
        """Draw the matrices as torch does, uniform in ± 1/√hidden_size; set gains and biases."""
        bound, H = 1.0 / math.sqrt(self.hidden_size), self.hidden_size
        for names in self._names:
            for name, full in names.items():
                parameter = getattr(self, full)
                if name.startswith("weight"):
                    nn.init.uniform_(parameter, -bound, bound)
                else:
                    gain = self._initial_gain if name.startswith("gain") else 0.0
                    nn.init.constant_(parameter, gain)
                if name == "bias_ih" and self._has_forget_gate:
                    nn.init.ones_(parameter[H : 2 * H])


class LayerNormLSTM(NormalizedStack):
    r"""LSTM with layer normalization inside the recurrence.

    Equations 20 to 22 in the supplement of Ba, Kiros & Hinton 2016, "Layer Normalization"
    (arXiv:1607.06450), with σ the logistic function::

        (i, f, g, o) = LN(W_hh h_{t-1}; gain_hh) + LN(W_ih x_t; gain_ih) + bias_ih + bias_hh
        c_t = σ(f) c_{t-1} + σ(i) tanh(g)
        h_t = σ(o) tanh(LN(c_t; gain_c, bias_c))

    Which variant this is: c is normalized only where h reads it; the c that is carried on is not.
    As in the paper, one norm spans all four gates, not one each, so their relative sizes survive.
    The shifts of its first two norms and its bias stand in one sum; here that sum is
    ``bias_ih + bias_hh``, as in torch. At h_0 = 0 the first norm is 0 and multiplies the gradient
    of h_0 by 1/√eps: begin elsewhere where h_0 is learned.

    Constructor, shapes, packed and unbatched input, gate order and the names of weights and biases
    are those of :class:`torch.nn.LSTM`: its ``state_dict`` loads with ``strict=False``. In addition
    each layer has ``gain_ih_l0`` and ``gain_hh_l0``, ``(4H,)``, ``gain_c_l0`` and ``bias_c_l0``,
    ``(H,)``. At first gains are 1, biases 0 but the forget gate's 1 (:class:`NormalizedStack`).

    Args:
        input_size: Features of the input.
        hidden_size: Features H of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether gates and norms have biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        recurrent_dropout: Probability that a unit of tanh(g) is dropped, with a new mask at every
            timestep and the rest scaled up, in training (Semeniuta, Severyn & Barth 2016,
            arXiv:1603.05118): c itself is not dropped, so memory survives. Default 0.
        zoneout: Probability that a unit of h and one of c keep what they were at a timestep, or a
            pair of these (Krueger et al. 2017, arXiv:1606.01305); out of training the expectation.
            h is computed of the c from before zoneout, as there. Default 0.
        normalize_cell: Whether h reads LN(c), as in the paper, or c. Default ``True``.
        eps: Added to variances. Default 1e-5, as of :class:`torch.nn.LayerNorm` and in the code of
            the paper.
        residual: Whether the input of each layer but the first is added to its output. Default
            ``False``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or ``hidden_size`` is 1 with ``normalize_cell``:
            the norm of a single unit is constant.

    Example:
        >>> lstm = LayerNormLSTM(3, 8, num_layers=2, recurrent_dropout=0.1, zoneout=(0.05, 0.5))
        >>> output, (h_n, c_n) = lstm(torch.randn(20, 4, 3))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([20, 4, 8]), torch.Size([2, 4, 8]), torch.Size([2, 4, 8]))
    """

    state_names: ClassVar[tuple[str, ...]] = ("h", "c")
    _has_forget_gate: ClassVar[bool] = True

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
        recurrent_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        normalize_cell: bool = True,
        eps: float = 1e-5,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_type("normalize_cell", normalize_cell, bool, "True or False")
        check_number("eps", eps, above=0)
        RecurrentNoise(recurrent_dropout, zoneout_pair(zoneout))
        if normalize_cell and hidden_size == 1:
            raise ValueError("hidden_size must be >= 2 with normalize_cell=True, got 1")
        # Plain values, which the constructor above needs for the shapes.
        self.recurrent_dropout, self.zoneout = recurrent_dropout, zoneout
        self.normalize_cell, self.eps = normalize_cell, eps
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            residual=residual, device=device, dtype=dtype,
        )  # fmt: skip

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        H = self.hidden_size
        shapes = GateWeights.shapes(4, features, H, bias=self.bias)
        shapes |= {"gain_ih": (4 * H,), "gain_hh": (4 * H,)}
        if self.normalize_cell:
            shapes |= {"gain_c": (H,)} | ({"bias_c": (H,)} if self.bias else {})
        return shapes

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        noise = RecurrentNoise(self.recurrent_dropout, zoneout_pair(self.zoneout), self.training)
        return LayerNormLSTMCell(
            GateWeights.of(weights), weights["gain_ih"], weights["gain_hh"],
            weights.get("gain_c"), weights.get("bias_c"), self.eps, noise,
        )  # fmt: skip

    def _own_defaults(self) -> dict[str, object]:
        return {"recurrent_dropout": 0.0, "zoneout": 0.0, "normalize_cell": True, "eps": 1e-5}


class LayerNormGRU(NormalizedStack):
    """GRU with layer normalization inside the recurrence.

    The GRU in the supplement of Ba, Kiros & Hinton 2016, "Layer Normalization" (arXiv:1607.06450),
    with σ the logistic function and the gates in torch's convention (their z is 1 - z here)::

        (r, z) = LN(W_h(r,z) h_{t-1}; gain_hh) + LN(W_i(r,z) x_t; gain_ih) + bias_ih + bias_hh
        n = tanh(LN(W_in x_t; gain_in, bias_in) + σ(r) LN(W_hn h_{t-1}; gain_hn, bias_hn))
        h_t = (1 - σ(z)) n + σ(z) h_{t-1}

    As there, one norm spans r and z together and another n, and r acts after the product with W_hn,
    as in :class:`torch.nn.GRU`, whose ``state_dict`` loads with ``strict=False``; its constructor,
    shapes, packed and unbatched input, gate order and names are those of this module. In addition
    each layer has ``gain_ih_l0`` and ``gain_hh_l0``, ``(3H,)``. The shifts of the norms are
    ``bias_ih`` and ``bias_hh``. At first gains are 1 and biases 0, as in the paper.

    Args:
        input_size: Features of the input.
        hidden_size: Features H of the hidden state, at least 2.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether gates and norms have biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        recurrent_dropout: Probability that a unit of n is dropped, with a new mask at every
            timestep and the rest scaled up, in training (Semeniuta, Severyn & Barth 2016,
            arXiv:1603.05118). Default 0.
        zoneout: Probability that a unit of h keeps what it was at a timestep (Krueger et al. 2017,
            arXiv:1606.01305); out of training the expectation. Default 0.
        eps: Added to variances. Default 1e-5, as of :class:`torch.nn.LayerNorm` and in the code of
            the paper.
        residual: Whether the input of each layer but the first is added to its output. Default
            ``False``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; ``hidden_size`` 1 is, because the norm of a
            single unit is constant.

    Example:
        >>> gru = LayerNormGRU(3, 8, batch_first=True, zoneout=0.1)
        >>> output, h_n = gru(torch.randn(4, 20, 3))
        >>> output.shape, h_n.shape
        (torch.Size([4, 20, 8]), torch.Size([1, 4, 8]))
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
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        eps: float = 1e-5,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number("eps", eps, above=0)
        RecurrentNoise(recurrent_dropout, (zoneout,))
        if hidden_size == 1:
            raise ValueError("hidden_size must be >= 2, got 1")
        # Plain values, which the constructor above needs for the shapes.
        self.recurrent_dropout, self.zoneout, self.eps = recurrent_dropout, zoneout, eps
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            residual=residual, device=device, dtype=dtype,
        )  # fmt: skip

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        rows = 3 * self.hidden_size
        shapes = GateWeights.shapes(3, features, self.hidden_size, bias=self.bias)
        return shapes | {"gain_ih": (rows,), "gain_hh": (rows,)}

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        noise = RecurrentNoise(self.recurrent_dropout, (self.zoneout,), self.training)
        return LayerNormGRUCell.of(weights, self.eps, noise)

    def _own_defaults(self) -> dict[str, object]:
        return {"recurrent_dropout": 0.0, "zoneout": 0.0, "eps": 1e-5}
