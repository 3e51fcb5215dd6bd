"""What the exact measurement of one call of a fused recurrent module rests on.

Everything is copied, so that the user may change tensors in place, and little enough to be kept:
some sequences, and fewer if they are long.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_gradguard.measure._call_shape import CallShape, Rows
from lightning_gradguard.measure._taps import is_plain
from lightning_gradguard.nn._fused import FusedLayers, runs_fused

RecurrentModule = nn.RNN | nn.LSTM | nn.GRU
States = Tensor | tuple[Tensor, Tensor] | None

# States of one layer, and sequences.
_MOST_STATES = 2**22
MOST_SEQUENCES = 16


class Capture:
    """Copies of the tensors of one call.

    Args:
        rnn: The module.
        shape: Of its input.
        data: The input; if it is packed, its data.
        hx: The state that it was given.

    Attributes:
        refusal: Why nothing could be kept, or empty.
        rows: Which sequences are kept.
        input: Their input.
        hx: Their states.
        output: What the module returned for them.
        grad_output: Gradient of that.
        grad_states: Gradients of the last states h and c.
        rng_state: Of the generator before the call, if its dropout has to be replayed.
    """

    def __init__(self, rnn: RecurrentModule, shape: CallShape, data: Tensor, hx: object) -> None:
        most = _MOST_STATES // (shape.timesteps * rnn.hidden_size)
        drops = rnn.training and rnn.dropout > 0 and rnn.num_layers > 1
        # A mask is drawn for all sequences, so it can only be drawn again for all of them.
        wanted = shape.sequences if drops else min(MOST_SEQUENCES, max(1, most))
        refusal = _refusal(rnn, data, drops=drops, fits=wanted <= max(1, most))
        self.refusal = refusal or _unknown_states(rnn, hx, shape.sequences)
        self.rows: Rows = shape.every(-(-shape.sequences // wanted))
        self.rng_state = torch.get_rng_state() if drops and not self.refusal else None
        self.grad_output: Tensor | None = None
        self.grad_states: list[Tensor | None] = [None, None]
        self.output: Tensor | None = None
        self.autocast_dtype = _autocast_dtype(data.device.type)
        self._rnn, self._training = rnn, rnn.training
        if self.refusal:
            return
        self.input = self.rows.data(data)
        self.hx = self._states(hx)
        self._versions = _versions(rnn)

    def add_output(self, grad: Tensor) -> None:
        """Take in a gradient of the output."""
        grad = self.rows.data(grad)
        self.grad_output = grad if self.grad_output is None else self.grad_output + grad

    def add_state(self, which: int, grad: Tensor) -> None:
        """Take in a gradient of h_n (0) or c_n (1)."""
        grad, before = self.rows.states(grad), self.grad_states[which]
        self.grad_states[which] = grad if before is None else before + grad

    def _states(self, hx: object) -> States:
        if isinstance(hx, tuple | list):
            hidden, cell = hx
            return self.rows.states(hidden), self.rows.states(cell)
        return self.rows.states(hx) if isinstance(hx, Tensor) else None

    def why_not(self) -> str:
        """Why there is no exact measurement of this call; empty if there is one."""
        refusal = self.refusal or _not_torchs_own(self._rnn)
        if refusal:
            return refusal
        if self.grad_output is None and all(grad is None for grad in self.grad_states):
            return "no gradient of its output arrived"
        if _versions(self._rnn) != self._versions:
            return "its weights changed between the forward pass and the measurement"
        if self._rnn.training != self._training:
            return "it changed between train and eval mode before the measurement"
        return ""


def _refusal(rnn: RecurrentModule, data: Tensor, *, drops: bool, fits: bool) -> str:
    foreign = _not_torchs_own(rnn)
    if foreign:
        return foreign
    if drops and data.device.type != "cpu":
        return (
            f"its dropout between layers cannot be replayed on {data.device.type}, where the "
            "kernel draws a mask that cannot be drawn again"
        )
    if not fits:
        return "its dropout between layers can only be replayed for a whole batch, too large here"
    return ""


def _unknown_states(rnn: RecurrentModule, hx: object, sequences: int) -> str:
    if hx is None:
        return ""
    pair = isinstance(hx, tuple | list) and len(hx) == 2
    states = list(hx) if isinstance(hx, tuple | list) else [hx]
    known = pair == isinstance(rnn, nn.LSTM) and all(
        is_plain(state) and (state.dim() == 2 or state.shape[1:2] == (sequences,))
        for state in states
    )
    return "" if known else "the state that it was given is of an unknown kind"


def _not_torchs_own(rnn: RecurrentModule) -> str:
    """Why a call cannot be repeated from the arguments and the weights; empty if it can.

    Nothing here may read a weight by its name: a parametrization computes it anew each time it is
    read, and spectral_norm changes its buffers as it does.
    """
    kind = next(kind for kind in (nn.RNN, nn.LSTM, nn.GRU) if isinstance(rnn, kind))
    own = (kind.forward, FusedLayers.forward)  # which runs the former if it runs fused
    if type(rnn).forward not in own or "forward" in vars(rnn) or not runs_fused(rnn):
        return "its forward is not torch's own"
    if is_parametrized(rnn):
        return "its weights are parametrized: reading them once more may change them"
    return special_weights(rnn)


def special_weights(module: nn.Module) -> str:
    """Why nothing can be computed from the weights of ``module`` alone; empty if it can."""
    if all(type(parameter) is nn.Parameter for parameter in module.parameters()):
        return ""
    return "its weights are sharded, or of another special kind"


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _versions(rnn: RecurrentModule) -> list[tuple[int, int]]:
    return [(p.data_ptr(), p._version) for p in rnn.parameters()]  # noqa: SLF001
