"""The arguments of an adjoint: checked, in one dtype and one layout.

Shape suffixes as in :mod:`lightning_gradguard.measure.adjoint`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard._validation import check_type
from lightning_gradguard.measure._sequences import Layout, Sequences, layout_of
from lightning_gradguard.nn._fused import runs_fused

RecurrentModule = nn.RNN | nn.LSTM | nn.GRU


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a recurrent module and the gradients of what it returned.

    ``F`` is the width of the output: that of all directions together.
    """

    rnn: RecurrentModule
    layout: Layout
    dtype: torch.dtype
    module_dtype: torch.dtype
    x_TBI: Tensor
    h0_KBP: Tensor | None
    c0_KBH: Tensor | None
    grad_output_TBF: Tensor
    grad_hn_KBP: Tensor | None
    grad_cn_KBH: Tensor | None
    output_TBF: Tensor | None
    output_dtype: torch.dtype
    rng_state: Tensor | None


def read_call(
    rnn: RecurrentModule,
    sequences: Sequences,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    grad_output: Sequences | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    output: Sequences | None,
    rng_state: Tensor | None,
    autocast_dtype: torch.dtype | None,
) -> Call:
    """Check the arguments of :func:`recurrent_adjoint` and bring them to one layout.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, if no gradient is given, or if the dropout mask cannot be
            known.
    """
    check_type("rnn", rnn, (nn.RNN, nn.LSTM, nn.GRU), "an nn.RNN, nn.LSTM or nn.GRU")
    if not runs_fused(rnn):
        raise ValueError(f"rnn must run torch's own fused forward, which this does not: {rnn}")
    _check_tensor("input", sequences, packed=True)
    is_lstm = isinstance(rnn, nn.LSTM)
    if grad_output is None and grad_hn is None and grad_cn is None:
        raise ValueError("one of grad_output, grad_hn and grad_cn must be given, got None for all")
    if grad_cn is not None and not is_lstm:
        raise ValueError(f"grad_cn must be None for {type(rnn).__name__}, which has no cell state")
    layout = layout_of(sequences, batch_first=rnn.batch_first)
    weight: Tensor = rnn.all_weights[0][0]
    _check_dropout(rnn, weight.device.type, rng_state)
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    reader = _Reader(rnn, layout, dtype, weight.device)
    x_TBI = reader.sequence("input", sequences, rnn.input_size)
    is_pair = isinstance(hx, tuple | list) and len(hx) == 2
    if hx is not None and (not is_pair if is_lstm else isinstance(hx, tuple | list)):
        raise TypeError(
            f"hx of {type(rnn).__name__} must be {'a pair (h_0, c_0)' if is_lstm else 'a tensor'}, "
            f"got {type(hx).__name__}"
        )
    h0, c0 = hx if isinstance(hx, tuple | list) else (hx, None)
    width = rnn.proj_size or rnn.hidden_size
    outputs = width * (2 if rnn.bidirectional else 1)
    if grad_output is None:
        direct_TBF = x_TBI.new_zeros((*x_TBI.shape[:2], outputs))
    else:
        direct_TBF = reader.sequence("grad_output", grad_output, outputs)
    return Call(
        rnn=rnn,
        layout=layout,
        dtype=dtype,
        module_dtype=weight.dtype,
        x_TBI=x_TBI,
        h0_KBP=reader.states("hx" if c0 is None else "hx[0]", h0, width),
        c0_KBH=reader.states("hx[1]", c0, rnn.hidden_size),
        grad_output_TBF=direct_TBF,
        grad_hn_KBP=reader.states("grad_hn", grad_hn, width),
        grad_cn_KBH=reader.states("grad_cn", grad_cn, rnn.hidden_size),
        output_TBF=None if output is None else reader.sequence("output", output, outputs),
        output_dtype=autocast_dtype or _dtype_of(output, weight.dtype),
        rng_state=rng_state,
    )


def _check_tensor(name: str, value: object, *, packed: bool = False) -> None:
    allowed: tuple[type, ...] = (Tensor, PackedSequence) if packed else (Tensor,)
    if not isinstance(value, allowed):
        kinds = "a tensor or a PackedSequence" if packed else "a tensor"
        raise TypeError(f"{name} must be {kinds}, got {type(value).__name__}")


def _packed_alike(a: PackedSequence, b: PackedSequence) -> bool:
    if not torch.equal(a.batch_sizes, b.batch_sizes):
        return False
    if a.sorted_indices is None or b.sorted_indices is None:
        return a.sorted_indices is b.sorted_indices
    return torch.equal(a.sorted_indices, b.sorted_indices)


def _dtype_of(value: Sequences | None, default: torch.dtype) -> torch.dtype:
    if value is None:
        return default
    return value.data.dtype if isinstance(value, PackedSequence) else value.dtype


def _check_dropout(rnn: RecurrentModule, device: str, rng_state: Tensor | None) -> None:
    if not (rnn.dropout > 0 and rnn.training and rnn.num_layers > 1):
        return
    if device != "cpu":
        raise ValueError(
            f"rnn must not use dropout between layers on {device}, got dropout={rnn.dropout}: its "
            "kernel draws a mask that cannot be drawn again"
        )
    if rng_state is None:
        raise ValueError(
            "rng_state must be torch.get_rng_state() from before the call, since rnn is in "
            f"training mode with dropout={rnn.dropout} between its layers, got None"
        )
    if rng_state.dtype is not torch.uint8:
        raise TypeError(f"rng_state must be torch.get_rng_state(), got {rng_state.dtype}")


@dataclass(frozen=True)
class _Reader:
    """Brings tensors to ``(T, B, F)`` or ``(K, B, F)`` in one dtype."""

    rnn: RecurrentModule
    layout: Layout
    dtype: torch.dtype
    device: torch.device

    def sequence(self, name: str, value: Sequences, width: int) -> Tensor:
        _check_tensor(name, value, packed=True)
        steps, size = self.layout.timesteps, len(self.layout.lengths_B)
        value_TBF = self._time_first(name, value)
        if value_TBF.shape != (steps, size, width):
            raise ValueError(
                f"{name} must have {steps} timesteps, {size} sequences and {width} features, got "
                f"{tuple(value_TBF.shape)}"
            )
        self._check_device(name, value_TBF)
        value_TBF = value_TBF.detach().to(self.dtype)
        if self.layout.packed is not None and isinstance(value, Tensor):
            alive_TB1 = self.layout.alive(value_TBF.device).unsqueeze(-1)
            value_TBF = torch.where(alive_TB1, value_TBF, 0.0)
        return value_TBF

    def _time_first(self, name: str, value: Sequences) -> Tensor:
        packed = self.layout.packed
        if isinstance(value, PackedSequence):
            if packed is None or not _packed_alike(value, packed):
                raise ValueError(f"{name} is packed with other lengths than input")
            return self.layout.time_first(value)
        if packed is not None:  # a padded tensor, in the layout in which the module pads
            first = self.rnn.batch_first and value.dim() == 3
            return value.transpose(0, 1) if first else value
        return self.layout.time_first(value)

    def states(self, name: str, value: Tensor | None, width: int) -> Tensor | None:
        if value is None:
            return None
        _check_tensor(name, value)
        count = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        size = (len(self.layout.lengths_B),) if self.layout.batched else ()
        if value.shape != (count, *size, width):
            raise ValueError(
                f"{name} must have shape {(count, *size, width)}, got {tuple(value.shape)}"
            )
        self._check_device(name, value)
        return self.layout.states(value.detach().to(self.dtype))

    def _check_device(self, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise ValueError(f"{name} must be on {self.device} like rnn, got {value.device}")
