"""LSTM with batch normalization inside the recurrence, with the statistics of each timestep.

Shape suffixes: ``T`` time, ``B`` batch, ``N`` all timesteps of all sequences that are packed,
``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_gradguard._validation import check_number
from lightning_gradguard.nn._batch_norm_cell import BatchNormLSTMCell, TimestepNorm
from lightning_gradguard.nn._scan import Cell, States, Trace, scan
from lightning_gradguard.nn.equations import GateWeights
from lightning_gradguard.nn.normalized import NormalizedStack

_NORMS = {"ih": 4, "hh": 4, "c": 1}


class BatchNormLSTM(NormalizedStack):
    r"""LSTM with batch normalization inside the recurrence.

    Cooijmans, Ballas, Laurent, Gülçehre & Courville 2017, "Recurrent Batch Normalization"
    (arXiv:1603.09025), with σ the logistic function::

        (i, f, g, o) = BN(W_hh h_{t-1}; gain_hh) + BN(W_ih x_t; gain_ih) + bias_ih + bias_hh
        c_t = σ(f) c_{t-1} + σ(i) tanh(g)
        h_t = σ(o) tanh(BN(c_t; gain_c, bias_c))

    As there, the statistics are those of each timestep, because the state takes a while to settle;
    gains and biases are shared by all timesteps; the norms of the gates have no shift, as the bias
    stands in the same sum; and the c that is carried on is not normalized. In training the
    statistics are those of the batch: of the sequences that are alive, so padded batches should be
    packed. In evaluation they are the running ones; from ``max_length`` on, and at timesteps that
    training never reached, those of the last timestep that has any.

    **Single rows.** Where only the longest sequence of a packed batch is left, training normalizes
    with the running statistics: one row has no variance, so that batch statistics would wipe its
    state out, and refusing would refuse nearly every packed batch. A whole batch of one sequence
    raises, as :class:`torch.nn.BatchNorm1d` does: nothing of it would ever be normalized.

    **The first timestep** has h_0 = 0 and so no variance, unless a state is given: the authors add
    noise to it, ``hx = (0.1 * torch.randn(…), torch.zeros(…))``. With a given state the statistics
    begin at the first timestep as well, so chunks of a sequence differ from the whole. The reverse
    direction counts from the end of each sequence. Statistics are of the batch of one process, as
    of :class:`torch.nn.BatchNorm1d`.

    Constructor, shapes, packed and unbatched input, gate order and the names of weights and biases
    are those of :class:`torch.nn.LSTM`: its ``state_dict`` loads with ``strict=False``. In addition
    each layer has ``gain_ih_l0`` and ``gain_hh_l0``, ``(4H,)``, ``gain_c_l0`` and ``bias_c_l0``,
    ``(H,)``, and the buffers ``running_mean_ih_l0``, ``running_var_ih_l0``, …, ``(max_length, …)``,
    and ``tracked_l0``. At first gains are 0.1, biases 0 but the forget gate's 1, as in the authors'
    code: with gains of 1 the gates saturate and the gradient vanishes.

    Args:
        input_size: Features of the input.
        hidden_size: Features H of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether gates and the norm of c have biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end to the beginning. Default
            ``False``.
        max_length: Timesteps with statistics of their own: the longest sequence in training, or
            fewer if the state settles sooner.
        momentum: Weight of a batch in the running statistics. Default 0.1, as of
            :class:`torch.nn.BatchNorm1d`; the authors average over the training set.
        eps: Added to variances. Default 1e-5, as there and in the authors' code.
        residual: Whether the input of each layer but the first is added to its output. Default
            ``False``.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> lstm = BatchNormLSTM(3, 8, max_length=20)
        >>> output, (h_n, c_n) = lstm(torch.randn(20, 4, 3))
        >>> output.shape, lstm.running_mean_hh_l0.shape
        (torch.Size([20, 4, 8]), torch.Size([20, 32]))
        >>> lstm.eval()(torch.randn(30, 1, 3))[0].shape
        torch.Size([30, 1, 8])
    """

    state_names: ClassVar[tuple[str, ...]] = ("h", "c")
    _initial_gain: ClassVar[float] = 0.1
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
        max_length: int,
        momentum: float = 0.1,
        eps: float = 1e-5,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number("max_length", max_length, at_least=1, integer=True)
        check_number("momentum", momentum, above=0, at_most=1)
        check_number("eps", eps, above=0)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            residual=residual, device=device, dtype=dtype,
        )  # fmt: skip
        self.max_length, self.momentum, self.eps = max_length, momentum, eps
        for names in self._names:
            suffix = names["weight_ih"].removeprefix("weight_ih")
            for norm, blocks in _NORMS.items():
                shape = (max_length, blocks * hidden_size)
                zeros = torch.zeros(shape, device=device, dtype=dtype)
                self.register_buffer(f"running_mean_{norm}{suffix}", zeros)
                self.register_buffer(f"running_var_{norm}{suffix}", torch.ones_like(zeros))
            tracked = torch.zeros(1, device=device, dtype=torch.long)
            self.register_buffer(f"tracked{suffix}", tracked)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, and forget all statistics."""
        super().reset_parameters()
        for name, buffer in self.named_buffers(recurse=False):
            buffer.fill_(1.0 if name.startswith("running_var") else 0.0)

    def _shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        H = self.hidden_size
        shapes = GateWeights.shapes(4, features, H, bias=self.bias)
        shapes |= {"gain_ih": (4 * H,), "gain_hh": (4 * H,), "gain_c": (H,)}
        return shapes | ({"bias_c": (H,)} if self.bias else {})

    def _cell(self, weights: Mapping[str, Tensor], part: int) -> Cell:
        biases = weights.get("bias_ih"), weights.get("bias_hh")
        bias = None if biases[0] is None or biases[1] is None else biases[0] + biases[1]
        shifts = {"ih": bias, "hh": None, "c": weights.get("bias_c")}
        norms = (
            TimestepNorm(
                weights[f"gain_{norm}"], shifts[norm],
                self._buffer(f"running_mean_{norm}", part),
                self._buffer(f"running_var_{norm}", part),
                self._buffer("tracked", part), self.momentum, self.eps, self.training,
            )
            for norm in _NORMS
        )  # fmt: skip
        if not self.training:
            norms = (norm.settled() for norm in norms)
        return BatchNormLSTMCell(GateWeights.of(weights), *norms)

    def _buffer(self, name: str, part: int) -> Tensor:
        buffer: Tensor = getattr(self, self._names[part]["weight_ih"].replace("weight_ih", name))
        return buffer

    def _layer(
        self,
        layer: int,
        x: Tensor,
        states: Sequence[States],
        batch_sizes: list[int] | None,
        trace: Trace | None,
    ) -> tuple[Tensor, list[States]]:
        """All directions of a layer.

        In packed data the reverse one, and its trace, count from the end of each sequence: else one
        sequence would be at its first state where another is at its fifth.
        """
        if self.training:
            self._track(layer, x, batch_sizes)
        if batch_sizes is None or not self.bidirectional:
            return super()._layer(layer, x, states, batch_sizes, trace)
        back = _backwards(batch_sizes, x.device)
        outputs, ends = [], []
        for way in range(2):
            part = 2 * layer + way
            output, end = scan(
                self._cell(self._weights(part), part), x[back] if way else x, states[way],
                batch_sizes, trace=trace, part=part,
            )  # fmt: skip
            outputs.append(output[back] if way else output)
            ends.append(end)
        return torch.cat(outputs, -1), ends

    def _track(self, layer: int, x: Tensor, batch_sizes: list[int] | None) -> None:
        """Note how many timesteps this batch has statistics for."""
        rows = batch_sizes or [x.size(1)] * x.size(0)
        if rows[0] < 2:
            raise ValueError(
                "Expected more than 1 value per channel when training, got a batch of 1 sequence: "
                "batch statistics need at least 2"
            )
        known = min(self.max_length, sum(alive > 1 for alive in rows))
        for way in range(self._directions):
            self._buffer("tracked", layer * self._directions + way).clamp_(min=known)

    def _own_defaults(self) -> dict[str, object]:
        return {"max_length": None, "momentum": 0.1, "eps": 1e-5}


def _backwards(batch_sizes: list[int], device: torch.device) -> Tensor:
    """Where packed data are once each sequence is reversed; its own inverse, ``(N,)``."""
    sizes = torch.tensor(batch_sizes)
    starts = sizes.cumsum(0) - sizes
    time = torch.repeat_interleave(torch.arange(len(batch_sizes)), sizes)
    sequence = torch.arange(len(time)) - starts[time]
    lengths = torch.bincount(sequence)
    return (starts[lengths[sequence] - 1 - time] + sequence).to(device)
