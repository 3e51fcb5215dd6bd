"""One call of a recurrent module repeated: its layers forward, by fused kernels, and then back.

Shape suffixes as in :mod:`lightning_gradguard.measure.adjoint`; ``F`` any number of features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lightning_gradguard.measure._adjoint_arguments import Call, RecurrentModule
from lightning_gradguard.measure._recurrences import (
    Weights,
)


class Replay:
    """Repeats one call.

    Args:
        call: The call and the gradients of what it returned.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        rnn = call.rnn
        self.directions = 2 if rnn.bidirectional else 1
        self.weights = [_read_weights(rnn, k, call.dtype) for k in range(len(rnn.all_weights))]
        self.masks = self._dropout_masks()
        self.inputs: list[Tensor] = []  # of each layer
        self.outputs: list[Tensor] = []  # of each layer and direction, in its own order of time

    def forward(self) -> None:
        """Find the states of all layers: those of the last are its output, where that is known."""
        rnn, x_TBF = self.call.rnn, self.call.x_TBI
        for layer, mask_TBF in enumerate(self.masks):
            if mask_TBF is not None:
                x_TBF = x_TBF * mask_TBF
            self.inputs.append(x_TBF)
            known_TBF = self.call.output_TBF if layer == rnn.num_layers - 1 else None
            if known_TBF is None:
                outputs = [self._run(layer, d) for d in range(self.directions)]
            else:
                parts = known_TBF.chunk(self.directions, dim=-1)
                outputs = [self.own(part, d) for d, part in enumerate(parts)]
            self.outputs += outputs
            if layer < rnn.num_layers - 1:
                x_TBF = torch.cat([self.own(h, d) for d, h in enumerate(outputs)], dim=-1)

    # -- forward ---------------------------------------------------------------------------------

    def _dropout_masks(self) -> list[Tensor | None]:
        """On the input of each layer, as the module has drawn them."""
        call, rnn = self.call, self.call.rnn
        masks: list[Tensor | None] = [None] * rnn.num_layers
        if call.rng_state is None or not (rnn.dropout and rnn.training):
            return masks
        width = self.directions * (rnn.proj_size or rnn.hidden_size)
        # Its mask follows the order of its data, and its dtype.
        like = self.call.layout.like_data(call.x_TBI.to(call.module_dtype), width)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(call.rng_state)
            for layer in range(1, rnn.num_layers):
                mask = dropout(like, rnn.dropout, training=True)
                masks[layer] = self.call.layout.from_data(mask).to(call.dtype)
        return masks

    def own(self, value_TBF: Tensor, direction: int) -> Tensor:
        """From real time to a direction's own order of time, or from that to real time."""
        return self.call.layout.reverse(value_TBF) if direction else value_TBF

    def start(self, k: int) -> tuple[Tensor, Tensor]:
        """The hidden and the cell state before the first timestep."""
        call, rnn = self.call, self.call.rnn
        size = call.x_TBI.shape[1]
        width = rnn.proj_size or rnn.hidden_size
        no_h, no_c = (call.x_TBI.new_zeros((size, n)) for n in (width, rnn.hidden_size))
        return (
            no_h if call.h0_KBP is None else call.h0_KBP[k],
            no_c if call.c0_KBH is None else call.c0_KBH[k],
        )

    def _run(self, layer: int, direction: int) -> Tensor:
        k = layer * self.directions + direction
        h0_BP, c0_BH = self.start(k)
        fused = _one_layer(self.call.rnn, self.weights[k])
        states = (h0_BP[None], c0_BH[None]) if isinstance(fused, nn.LSTM) else h0_BP[None]
        h_TBP: Tensor = fused(self.own(self.inputs[layer], direction), states)[0]
        if self.call.layout.ragged:
            # Beyond the end of a sequence the module goes on with zeros, and may overflow.
            alive_TB = self.call.layout.alive(h_TBP.device)
            h_TBP = torch.where(alive_TB.unsqueeze(-1), h_TBP, 0.0)
        return h_TBP


def _read_weights(rnn: RecurrentModule, k: int, dtype: torch.dtype) -> Weights:
    ih, hh, *rest = (w.detach().to(dtype) for w in rnn.all_weights[k])
    none = ih.new_zeros(())
    bias_ih, bias_hh = (rest.pop(0), rest.pop(0)) if rnn.bias else (none, none)
    return Weights(ih, hh, bias_ih, bias_hh, rest[0] if rest else None)


def _one_layer(rnn: RecurrentModule, weights: Weights) -> nn.Module:
    """A module of one layer and direction with these weights.

    A module of its own, because cuDNN wants its weights in one piece of memory.
    """
    sizes = {"input_size": weights.ih.shape[1], "hidden_size": rnn.hidden_size, "bias": rnn.bias}
    # On "meta" first: what a module starts with would be drawn from the user's random numbers.
    place = {"device": "meta", "dtype": weights.ih.dtype}
    layer: RecurrentModule
    if isinstance(rnn, nn.LSTM):
        layer = nn.LSTM(**sizes, proj_size=rnn.proj_size, **place)
    elif isinstance(rnn, nn.GRU):
        layer = nn.GRU(**sizes, **place)
    else:
        layer = nn.RNN(**sizes, nonlinearity=rnn.nonlinearity, **place)
    layer.to_empty(device=weights.ih.device)
    values = [weights.ih, weights.hh]
    if rnn.bias:
        values += [weights.bias_ih, weights.bias_hh]
    if weights.hr is not None:
        values.append(weights.hr)
    for parameter, value in zip(layer.all_weights[0], values, strict=True):
        parameter.copy_(value)
    return layer
