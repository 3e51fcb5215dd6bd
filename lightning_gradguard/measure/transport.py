"""The transport gain of fused recurrent modules as a function of their weights.

:func:`recurrent_adjoint` tells it as a number. Here states, inputs and adjoints are constants, and
the map from one timestep to the next is written out, for all timesteps side by side, so that
autograd can go back through its Jacobian.

Shape suffixes: ``T`` time, ``S`` steps from a timestep to the next, ``B`` batch, ``I`` input, ``H``
hidden, ``P`` output of the projection (H without one), ``G`` all gates together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_gradguard.measure._adjoint_arguments import read_call
from lightning_gradguard.measure._capture import Capture, RecurrentModule
from lightning_gradguard.measure._recurrences import Weights
from lightning_gradguard.measure._recurrent_calls import RecurrentWatch
from lightning_gradguard.measure._replay import Replay
from lightning_gradguard.measure._taps import Switch
from lightning_gradguard.measure._time_modules import find_time_modules
from lightning_gradguard.measure._way_back import Direction, ReplayError, WayBack
from lightning_gradguard.measure.decay import float_floor


@dataclass(frozen=True, eq=False)
class Transitions:
    """All steps between timesteps of one layer and direction in one call, in real time.

    Attributes:
        rnn: The module.
        part: Number of the layer and direction in torch's order.
        x_SBI: Input of the step.
        states: What the step begins with: h, or (h, c).
        arriving: Adjoint of what it leads to, divided by its norm in each step.
        known_S: Whether that norm is finite and above the float floor, so that it has a direction.
    """

    rnn: RecurrentModule
    part: int
    x_SBI: Tensor
    states: tuple[Tensor, ...]
    arriving: tuple[Tensor, ...]
    known_S: Tensor

    def gain(self) -> Tensor:
        """ρ of each step, ``(S,)``, with a graph to the weights; 0 where it is not known."""
        with torch.enable_grad(), torch.autocast(self.x_SBI.device.type, enabled=False):
            weights = _live_weights(self.rnn, self.part, self.x_SBI.dtype)
            states = tuple(state.detach().requires_grad_() for state in self.states)
            after = one_step(self.rnn, weights, self.x_SBI, states)
            sent = torch.autograd.grad(after, states, self.arriving, create_graph=True)
            flat_SN = torch.cat([part.flatten(1) for part in sent], dim=1)
            norms_S: Tensor = torch.linalg.vector_norm(flat_SN, dim=1)
        return norms_S


class TransportProbe:
    """Watches the calls of fused recurrent modules, and tells their steps.

    Of each call at most 16 sequences are kept, fewer of long ones, as for the exact measurement.
    Nothing of the user's forward or backward pass changes.

    Args:
        model: The model.
        modules: ``"auto"`` for every ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``; or names or patterns.
        parameters: Watch only modules that own one of these; default all that train.
        on_error: Told of an error inside a hook; default: it is raised there.

    Attributes:
        names: Paths of the watched modules.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name matches no module, or one of another kind.

    Example:
        >>> rnn = nn.RNN(3, 8)
        >>> probe = TransportProbe(rnn)
        >>> rnn(torch.randn(20, 4, 3))[0][-1].sum().backward()
        >>> steps, reasons = probe.collect()
        >>> [tuple(one.gain().shape) for one in steps["RNN"]], reasons
        ([(19,)], {})
        >>> probe.close()
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Literal["auto"] | Sequence[str] = "auto",
        *,
        parameters: Collection[nn.Parameter] | None = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        if isinstance(modules, Mapping):
            raise TypeError(f"modules must be 'auto' or a sequence of names, got {modules!r}")
        found, self.unwatched = find_time_modules(model, modules, parameters)
        self._switch = Switch(on_error=on_error)
        self._watches: list[RecurrentWatch] = []
        for one in found:
            if isinstance(one.module, nn.RNN | nn.LSTM | nn.GRU):
                self._watches.append(RecurrentWatch(one.name, one.module, self._switch))
            elif modules != "auto":
                raise ValueError(
                    "modules must name modules of type nn.RNN, nn.LSTM or nn.GRU, got "
                    f"{one.name!r}, which is {type(one.module).__name__}"
                )
        self.names: tuple[str, ...] = tuple(watch.name for watch in self._watches)
        for watch in self._watches:
            watch.attach()

    @property
    def watching(self) -> bool:
        """Whether the coming forward passes are watched; default ``True``."""
        return self._switch.watching

    @watching.setter
    def watching(self, value: bool) -> None:
        self._switch.watching = value

    def collect(self) -> tuple[dict[str, list[Transitions]], dict[str, str]]:
        """The steps of each module since the last call, and of others why there are none.

        Call it before the weights change.
        """
        steps: dict[str, list[Transitions]] = {}
        reasons: dict[str, str] = {}
        for watch in self._watches:
            steps[watch.name], reason = _of_module(watch)
            if reason:
                reasons[watch.name] = reason
        self.discard()
        return steps, reasons

    def discard(self) -> None:
        """Forget what the passes since the last :meth:`collect` have left."""
        for watch in self._watches:
            watch.forget()

    def close(self) -> None:
        """Take the hooks off the model."""
        for watch in self._watches:
            watch.detach()
            watch.forget()


def _of_module(watch: RecurrentWatch) -> tuple[list[Transitions], str]:
    """The steps of all of its calls, or why there are none."""
    captures = [call.capture for call in watch.calls if call.capture is not None]
    why_not = next(filter(None, (capture.why_not() for capture in captures)), "")
    if why_not:
        return [], why_not
    try:
        return [one for capture in captures for one in transitions(watch.module, capture)], ""
    except (ReplayError, TypeError, ValueError) as error:
        return [], str(error)


@torch.no_grad()
def transitions(rnn: RecurrentModule, capture: Capture) -> list[Transitions]:
    """The steps of each layer and direction of one call.

    Args:
        rnn: The module.
        capture: Of the call, with the gradients that it got.

    Raises:
        ReplayError: If its output is not what the module returns for this input.
        ValueError: If the call cannot be repeated.
    """
    rows, grad, output = capture.rows, capture.grad_output, capture.output
    grad_hn, grad_cn = capture.grad_states
    call = read_call(
        rnn,
        rows.sequence(capture.input),
        capture.hx,
        None if grad is None else rows.sequence(grad),
        grad_hn,
        grad_cn,
        None if output is None else rows.sequence(output),
        capture.rng_state,
        capture.autocast_dtype,
    )
    with torch.autocast(call.x_TBI.device.type, enabled=False):
        replay = Replay(call)
        replay.forward()
        directions, _ = WayBack(replay).run()
        return [_steps(replay, k, direction) for k, direction in enumerate(directions)]


def _steps(replay: Replay, k: int, direction: Direction) -> Transitions:
    layer, way = divmod(k, replay.directions)
    x_TBI, h_TBP = replay.own(replay.inputs[layer], way), replay.outputs[k]
    states, arriving = [h_TBP[:-1]], [replay.own(direction.hidden_TBP, way)[1:]]
    if direction.cell_TBH is not None:
        c_TBH, f_TBH = _cells(replay, k, x_TBI)
        total_TBH = replay.own(direction.cell_TBH, way)
        # As a coordinate beside h, c gets what comes from its next value, and not through h.
        own_TBH = torch.cat([f_TBH[1:] * total_TBH[1:], torch.zeros_like(total_TBH[:1])])
        if replay.call.grad_cn_KBH is not None:
            own_TBH = replay.call.layout.add_at_ends(own_TBH, replay.call.grad_cn_KBH[k])
        states.append(c_TBH[:-1])
        arriving.append(own_TBH[1:])
    x_SBI, *states = (_at_boundary(replay, way, value) for value in (x_TBI[1:], *states))
    arriving = [_at_boundary(replay, way, value) for value in arriving]
    flat_SN = torch.cat([part.flatten(1) for part in arriving], dim=1)
    wide = torch.float32 if flat_SN.device.type == "mps" else torch.float64
    norms_S: Tensor = torch.linalg.vector_norm(flat_SN, dim=1, dtype=wide)
    known_S = norms_S.isfinite() & (norms_S > float_floor(flat_SN.dtype, flat_SN.shape[1]))
    scales_S11 = norms_S.where(known_S, 1.0).reciprocal()[:, None, None]
    units = [(p * scales_S11).to(p.dtype).where(known_S[:, None, None], 0.0) for p in arriving]
    return Transitions(replay.call.rnn, k, x_SBI, tuple(states), tuple(units), known_S)


def _at_boundary(replay: Replay, way: int, value_SBF: Tensor) -> Tensor:
    """From a direction's own order of time to real time, which sequences of all lengths share."""
    return replay.call.layout.reverse(value_SBF, shorter_by=1) if way else value_SBF


def _cells(replay: Replay, k: int, x_TBI: Tensor) -> tuple[Tensor, Tensor]:
    """The cell states and the forget gates of an LSTM."""
    h0_BP, c = replay.start(k)
    before_TBP = torch.cat([h0_BP.unsqueeze(0), replay.outputs[k][:-1]])
    i, f, g, _ = _lstm_gates(replay.weights[k], x_TBI, before_TBP)
    c_TBH = i * g
    for t in range(len(c_TBH)):
        c = c_TBH[t].addcmul_(f[t], c)
    return c_TBH, f


def one_step(
    rnn: RecurrentModule, w: Weights, x_SBI: Tensor, states: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The states after one timestep, by plain operations.

    Args:
        rnn: The module.
        w: Weights of the layer and direction.
        x_SBI: Its input, for any number of steps side by side.
        states: Its states before, h or (h, c).
    """
    h_SBP = states[0]
    if isinstance(rnn, nn.LSTM):
        i, f, g, o = _lstm_gates(w, x_SBI, h_SBP)
        c_SBH = f * states[1] + i * g
        out_SBH = o * c_SBH.tanh()
        return (out_SBH if w.hr is None else out_SBH @ w.hr.T), c_SBH
    if isinstance(rnn, nn.GRU):
        two = 2 * rnn.hidden_size
        x_SBG, h_SBG = x_SBI @ w.ih.T + w.bias_ih, h_SBP @ w.hh.T + w.bias_hh
        r, z = (x_SBG[..., :two] + h_SBG[..., :two]).sigmoid().chunk(2, dim=-1)
        n = (x_SBG[..., two:] + r * h_SBG[..., two:]).tanh()
        return ((1.0 - z) * n + z * h_SBP,)
    sums_SBH = x_SBI @ w.ih.T + w.bias_ih + h_SBP @ w.hh.T + w.bias_hh
    return (sums_SBH.relu() if rnn.nonlinearity == "relu" else sums_SBH.tanh(),)


def _lstm_gates(w: Weights, x_TBI: Tensor, h_TBP: Tensor) -> tuple[Tensor, ...]:
    gates = (x_TBI @ w.ih.T + w.bias_ih + h_TBP @ w.hh.T + w.bias_hh).chunk(4, dim=-1)
    return gates[0].sigmoid(), gates[1].sigmoid(), gates[2].tanh(), gates[3].sigmoid()


def _live_weights(rnn: RecurrentModule, k: int, dtype: torch.dtype) -> Weights:
    """The weights themselves, not copies."""
    ih, hh, *rest = (weight.to(dtype) for weight in rnn.all_weights[k])
    none = ih.new_zeros(())
    bias_ih, bias_hh = (rest.pop(0), rest.pop(0)) if rnn.bias else (none, none)
    return Weights(ih, hh, bias_ih, bias_hh, rest[0] if rest else None)
