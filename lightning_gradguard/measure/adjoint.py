"""Exact gradients through time inside fused recurrent modules.

A fused ``nn.LSTM`` shows autograd its input and its output, but no state in between, and a hook on
the output sees only what the loss sends there directly. The adjoint of every state follows from
what the module was given and what it was asked for: its input, its weights, and the gradients of
its outputs. No graph of the user's is run again, and no gradient of a weight is computed.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``P`` output of one direction, ``H`` hidden,
``K`` layers times directions, ``S`` boundaries between timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradguard.measure._adjoint_arguments import read_call
from lightning_gradguard.measure._replay import Replay
from lightning_gradguard.measure._sequences import Sequences
from lightning_gradguard.measure._way_back import ReplayError, WayBack

__all__ = ["RecurrentAdjoint", "ReplayError", "recurrent_adjoint"]


@dataclass(frozen=True, eq=False)
class RecurrentAdjoint:
    """Gradients of one scalar with respect to every state of a recurrent module.

    ``K`` counts layers and directions in torch's order: l0, l0_reverse, l1, … Time is real time for
    reverse directions too, and sequences are in the order of the caller. Everything is zero beyond
    the end of a sequence.

    Attributes:
        hidden: dL/dh_t, shape ``(K, T, B, P)``.
        cell: dL/dc_t of an LSTM, also through h_t, shape ``(K, T, B, H)``.
        input: dL/dx_t, shape ``(T, B, I)``.
        arriving: Norm of the adjoint of the state on that side of the boundary between the
            timesteps t and t + 1 from which it goes on: t + 1, or t in a reverse direction. Shape
            ``(K, T - 1, B)``. The state of an LSTM is (h, c) jointly, and the adjoint of c as a
            coordinate of its own is what reaches it from the future, not through h_t.
        transported: Norm of what of it gets to the other side, shape ``(K, T - 1, B)``.
        followed: Norm of the last gradient that enters each sequence, followed back alone, shape
            ``(K, T, B)``. Where the loss enters at its end only, that is all there is. Where it
            enters all along, most of the adjoint is fresh signal, and a fresh signal loses more of
            its norm in its first steps than later; the gain of this one is that of the way.
        input_norms: Norm of the gradient that each direction sends to the input of its layer, shape
            ``(K, T, B)``.
        lengths: Length of each sequence, shape ``(B,)``, int64, on the CPU.
        causes: What the gain follows from, for each layer and direction a mean over all timesteps
            and units: ``forget_gate`` (LSTM), ``update_gate`` (GRU), or ``activation_slope`` beside
            the ``spectral_radius`` of the recurrent weights (RNN).
    """

    hidden: Tensor
    cell: Tensor | None
    input: Tensor
    arriving: Tensor
    transported: Tensor
    followed: Tensor
    input_norms: Tensor
    lengths: Tensor
    causes: tuple[dict[str, Tensor], ...] = field(repr=False)

    @property
    def gain(self) -> Tensor:
        """Transport gain ρ_t over all sequences, shape ``(K, T - 1)``; NaN where nothing arrives.

        The norm of (∂s_{t+1}/∂s_t)ᵀ a_{t+1} over that of a_{t+1} (Pascanu et al. 2013, eq. 9).
        """
        arriving_KS: Tensor = torch.linalg.vector_norm(self.arriving, dim=-1)
        transported_KS: Tensor = torch.linalg.vector_norm(self.transported, dim=-1)
        return transported_KS / arriving_KS


def recurrent_adjoint(
    rnn: nn.RNN | nn.LSTM | nn.GRU,
    input: Sequences,  # noqa: A002 - as torch's own modules call it
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    grad_output: Sequences | None = None,
    grad_hn: Tensor | None = None,
    grad_cn: Tensor | None = None,
    output: Sequences | None = None,
    rng_state: Tensor | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> RecurrentAdjoint:
    """Compute the gradient with respect to every hidden state, cell state and input.

    float16 and bfloat16 modules are computed in float32. Weights, gradients, buffers and random
    number generators stay as they are.

    Args:
        rnn: The module, with any number of layers, direction, bias and projection.
        input: What it was called with: ``(T, B, I)``, ``(B, T, I)`` if ``batch_first``, ``(T, I)``,
            or packed.
        hx: The state it was called with; default zero.
        grad_output: Direct gradient of its output, in the layout of the output; of a packed output
            also as a padded tensor.
        grad_hn: Direct gradient of its last hidden state.
        grad_cn: Direct gradient of the last cell state of an LSTM.
        output: What it returned, if known: the replay is checked against it.
        rng_state: ``torch.get_rng_state()`` from before the call. Needed where dropout between
            layers was active, to replay its mask.
        autocast_dtype: The dtype of autocast in which it was called, if it was: ``output`` is then
            only as precise as that.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, if no gradient is given, or if the dropout mask cannot be
            known.
        ReplayError: If ``output`` is not what the module returns for this input.

    Example:
        >>> rnn = nn.LSTM(3, 8)
        >>> sequence = torch.randn(20, 4, 3)
        >>> at_the_end = torch.zeros(20, 4, 8)
        >>> at_the_end[-1] = 1.0
        >>> adjoint = recurrent_adjoint(rnn, sequence, grad_output=at_the_end)
        >>> adjoint.hidden.shape, adjoint.gain.shape
        (torch.Size([1, 20, 4, 8]), torch.Size([1, 19]))
        >>> bool(adjoint.hidden[0, 0].norm() < adjoint.hidden[0, -1].norm())
        True
    """
    call = read_call(
        rnn, input, hx, grad_output, grad_hn, grad_cn, output, rng_state, autocast_dtype
    )
    with torch.no_grad(), torch.autocast(call.x_TBI.device.type, enabled=False):
        replay = Replay(call)
        replay.forward()
        directions, input_TBI = WayBack(replay).run()
    cells = [d.cell_TBH for d in directions if d.cell_TBH is not None]
    return RecurrentAdjoint(
        hidden=torch.stack([d.hidden_TBP for d in directions]),
        cell=torch.stack(cells) if cells else None,
        input=input_TBI,
        arriving=torch.stack([d.arriving_SB for d in directions]),
        transported=torch.stack([d.transported_SB for d in directions]),
        followed=torch.stack([d.followed_TB for d in directions]),
        input_norms=torch.stack([d.input_norms_TB for d in directions]),
        lengths=call.layout.lengths_B,
        causes=tuple(d.causes for d in directions),
    )
