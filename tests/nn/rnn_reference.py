"""Recurrent layers from their equations, one sequence, one timestep, one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


def lstm_step(w: dict[str, Tensor], x: Tensor, state: State) -> State:
    """i = σ(…), f = σ(…), g = tanh(…), o = σ(…); c′ = f c + i g; h′ = W_hr (o tanh c′)."""
    h, c = state
    size = c.shape[0]

    def gate(number: int) -> Tensor:
        own = slice(number * size, (number + 1) * size)
        total = w["weight_ih"][own] @ x + w["weight_hh"][own] @ h
        return total + w["bias_ih"][own] + w["bias_hh"][own] if "bias_ih" in w else total

    i, f, g, o = gate(0).sigmoid(), gate(1).sigmoid(), gate(2).tanh(), gate(3).sigmoid()
    c = f * c + i * g
    h = o * c.tanh()
    return (w["weight_hr"] @ h if "weight_hr" in w else h), c


def gru_step(w: dict[str, Tensor], x: Tensor, state: State) -> State:
    """r = σ(…), z = σ(…), n = tanh(W x + b + r (U h + d)); h′ = (1 - z) n + z h."""
    (h,) = state
    size = h.shape[0]

    def halves(number: int) -> tuple[Tensor, Tensor]:
        own = slice(number * size, (number + 1) * size)
        a, b = w["weight_ih"][own] @ x, w["weight_hh"][own] @ h
        return (a + w["bias_ih"][own], b + w["bias_hh"][own]) if "bias_ih" in w else (a, b)

    r, z = sum(halves(0)).sigmoid(), sum(halves(1)).sigmoid()
    from_x, from_h = halves(2)
    n = (from_x + r * from_h).tanh()
    return ((1 - z) * n + z * h,)


def elman_step(name: str, leak: float, w: dict[str, Tensor], x: Tensor, state: State) -> State:
    """h′ = φ(W x + b + U h + d)."""
    total = w["weight_ih"] @ x + w["weight_hh"] @ state[0]
    if "bias_ih" in w:
        total = total + w["bias_ih"] + w["bias_hh"]
    if name == "tanh":
        return (total.tanh(),)
    slope = {"relu": 0.0, "leaky_relu": leak, "prelu": w.get("slope", torch.zeros(1))}[name]
    return (torch.where(total > 0, total, slope * total),)


def step_of(rnn: nn.RNNBase, w: dict[str, Tensor], x: Tensor, state: State) -> State:
    if isinstance(rnn, nn.LSTM):
        return lstm_step(w, x, state)
    if isinstance(rnn, nn.GRU):
        return gru_step(w, x, state)
    return elman_step(rnn.nonlinearity, rnn.negative_slope, w, x, state)


def one_sequence(
    rnn: nn.RNNBase, x_TI: Tensor, hx: Sequence[Tensor] | None, *, residual: bool
) -> tuple[Tensor, list[State]]:
    """Output (T, H) and the last state of each layer and direction."""
    named, ends, layer_input = dict(rnn.named_parameters()), [], list(x_TI)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "slope")
    for layer in range(rnn.num_layers):
        ways = []
        for way in ("", "_reverse") if rnn.bidirectional else ("",):
            full = {name: f"{name}_l{layer}{way}" for name in names}
            w = {name: named[long] for name, long in full.items() if long in named}
            sizes = [rnn.proj_size or rnn.hidden_size]
            sizes += [rnn.hidden_size] if isinstance(rnn, nn.LSTM) else []
            state = tuple(
                x_TI.new_zeros(size) if hx is None else hx[n][len(ends)]
                for n, size in enumerate(sizes)
            )
            outputs: dict[int, Tensor] = {}
            times = range(len(layer_input))
            for time in reversed(times) if way else times:
                state = step_of(rnn, w, layer_input[time], state)
                outputs[time] = state[0]
            ways.append(outputs)
            ends.append(state)
        output = [torch.cat([way[time] for way in ways]) for time in range(len(layer_input))]
        if residual and layer > 0:
            output = [a + b for a, b in zip(output, layer_input, strict=True)]
        layer_input = output
    return torch.stack(layer_input), ends
