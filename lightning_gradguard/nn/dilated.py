"""Recurrent layers that look back over more than one timestep, with fused kernels.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``S`` dilation, ``D`` all dilations times
directions, ``H`` hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_gradguard._validation import check_choice, check_number, check_type
from lightning_gradguard.nn._folding import Run, run_dilated
from lightning_gradguard.nn._scan import States
from lightning_gradguard.nn._sequences import Input, Layout, read_input, read_state
from lightning_gradguard.nn.stack import State

CellName = Literal["lstm", "gru", "rnn"]
_OF_TORCH = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)_l(\d+)(_reverse)?")
_FUSED = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class DilatedRNN(nn.Module):
    """Recurrent layers each of which continues the state of ``s`` timesteps ago.

    Chang et al. 2017, "Dilated recurrent neural networks": layer l computes

        c_t = f(x_t, c_{t-s_l}),    s_l = 1, 2, 4, …,

    so that what happened T timesteps ago is only T / s_l applications of f away. A timestep depends
    on none of the s_l - 1 before it: they are folded into the batch, and the kernel of torch runs
    over T / s_l timesteps of s_l times as many sequences (the first T mod s_l timesteps are one
    call of their own).

    Constructor, shapes, ``PackedSequence``, unbatched input and return values are those of
    :class:`torch.nn.LSTM` (:class:`torch.nn.GRU`, :class:`torch.nn.RNN`), whose ``state_dict`` it
    loads, though its own has the names of ``layers``; except for the state: a
    layer carries on its last s_l states. ``h_n`` and ``c_n`` have the shape ``(D, B, H)``, where D
    is ``sum(dilations)``, twice that if bidirectional: layer by layer, in a layer the reverse
    direction after the forward one, and for each the states after its last s_l timesteps, oldest
    first. With them a long sequence can be run in chunks of any lengths. The plain last state of
    the last layer is ``output[-1]``.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other. Default 1.
        bias: Whether the gates have biases. Default ``True``.
        batch_first: Whether input and output are ``(B, T, …)``. Default ``False``.
        dropout: Of the output of each layer but the last, in training. Default 0.
        bidirectional: Whether each layer also goes from the end of each sequence to the beginning.
            Default ``False``.
        cell: ``"lstm"`` (default), ``"gru"`` or ``"rnn"`` (tanh).
        dilations: s_l of each layer. Default: 1, 2, 4, …, as in the paper.
        residual: Whether the input of each layer but the first is added to its output. Default
            ``False``.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        dilations: s_l of each layer.
        layers: One ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` of one layer for each layer; its attribute
            ``timesteps_per_step`` is s_l.
        layers_reverse: The same for the reverse direction; ``None`` if there is none.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> rnn = DilatedRNN(3, 5, num_layers=4, cell="gru")
        >>> rnn.dilations
        (1, 2, 4, 8)
        >>> output, h_n = rnn(torch.randn(20, 2, 3))
        >>> output.shape, h_n.shape
        (torch.Size([20, 2, 5]), torch.Size([15, 2, 5]))
        >>> more, h_n = rnn(torch.randn(7, 2, 3), h_n)  # goes on where the first 20 ended
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
        cell: CellName = "lstm",
        dilations: Sequence[int] | None = None,
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
        check_choice("cell", cell, get_args(CellName))
        check_type("residual", residual, bool, "a bool")
        self.dilations = _checked(dilations, num_layers)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.cell, self.residual = bidirectional, cell, residual
        self.layers = nn.ModuleList()
        self.layers_reverse = nn.ModuleList() if bidirectional else None
        for layer, dilation in enumerate(self.dilations):
            features = input_size if layer == 0 else hidden_size * self._directions
            for children in self._ways:
                child = _FUSED[cell](features, hidden_size, bias=bias, device=device, dtype=dtype)
                # So that what is measured along its time can be told in timesteps of the sequence.
                child.timesteps_per_step = dilation
                children.append(child)

    @staticmethod
    def path_of(name: str) -> str:
        """Where a parameter of torch's own modules is here.

        Example:
            >>> DilatedRNN.path_of("weight_hh_l2_reverse")
            'layers_reverse.2.weight_hh_l0'
        """
        found = _OF_TORCH.fullmatch(name)
        return f"layers{found[3] or ''}.{found[2]}.{found[1]}_l0" if found else name

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take names of torch's own modules too."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[prefix + self.path_of(key[len(prefix) :])] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _ways(self) -> list[nn.ModuleList]:
        """The layers in each direction."""
        return [ways for ways in (self.layers, self.layers_reverse) if ways is not None]

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as torch does: uniform in ± 1/√hidden_size."""
        for layer in range(self.num_layers):
            for children in self._ways:
                children[layer].reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        input: Input,  # noqa: A002 - as torch's own modules call it
        hx: State | None = None,
    ) -> tuple[Input, State]:
        """Run all layers.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` if ``batch_first``, ``(T, I)``, or packed.
            hx: The state to begin with, as this returns it. Default zero.

        Returns:
            The output, ``(T, B, H)`` in the layout of the input (2H if bidirectional), and the
            last states of all layers, ``(D, B, H)``, for an LSTM those of c as well.

        Raises:
            RuntimeError: If a shape does not fit.
            ValueError: If the number of dimensions or the dtype does not fit.
        """
        weight = next(self.parameters())
        x, layout = read_input(
            type(self).__name__, input, self.input_size, weight, batch_first=self.batch_first
        )
        batch_sizes = None if layout.packed is None else layout.packed.batch_sizes
        given = self._given_states(hx, layout, x)
        ends: list[States] = []
        for layer, dilation in enumerate(self.dilations):
            outputs = []
            for way, children in enumerate(self._ways):
                before = given[len(ends)]
                if torch.is_autocast_enabled(x.device.type):  # layers may differ in their dtype
                    before = tuple(state.to(x.dtype) for state in before)
                output, end = run_dilated(
                    self._run(children[layer]), x, before, batch_sizes, dilation, reverse=way == 1
                )
                outputs.append(output)
                ends.append(end)
            x = self._between(
                x, torch.cat(outputs, -1) if self.bidirectional else outputs[0], layer
            )
        last = tuple(layout.state(torch.cat(parts)) for parts in zip(*ends, strict=True))
        return layout.output(x), last if self.cell == "lstm" else last[0]

    def _run(self, child: nn.Module) -> Run:
        """A layer of torch, with states ``(B, H)`` in a tuple whatever the cell."""

        def run(chains: Input, states: States) -> tuple[Input, States]:
            hx = tuple(state.unsqueeze(0) for state in states)
            output, last = child(chains, hx if self.cell == "lstm" else hx[0])
            return output, tuple(s.squeeze(0) for s in (last if self.cell == "lstm" else (last,)))

        return run

    def _between(self, x: Tensor, output: Tensor, layer: int) -> Tensor:
        """What comes out of a layer, given what went into it."""
        if self.residual and layer > 0:
            output = output + x
        if layer < self.num_layers - 1 and self.dropout:
            output = nn.functional.dropout(output, self.dropout, self.training)
        return output

    def _given_states(self, hx: State | None, layout: Layout, x: Tensor) -> list[States]:
        """For each layer and direction the states before the first timestep, ``(S, B, H)``."""
        parts = [dilation for dilation in self.dilations for _ in range(self._directions)]
        shape = (sum(parts), layout.batch, self.hidden_size)
        count = 2 if self.cell == "lstm" else 1
        if hx is None:
            zeros = x.new_zeros(max(parts), *shape[1:])
            return [(zeros[:dilation],) * count for dilation in parts]
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != count:
            names = "h and c" if count == 2 else "h"
            raise RuntimeError(f"Expected hx to be {names}, got {len(given)} tensors")
        labels = ["hidden"] if count == 1 else ["hidden[0]", "hidden[1]"]
        states = [
            read_state(s, shape, layout, label) for s, label in zip(given, labels, strict=True)
        ]
        return list(zip(*(state.split(parts) for state in states), strict=True))

    def extra_repr(self) -> str:
        """As of torch's own modules: what differs from the defaults."""
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
            "bidirectional": False, "cell": "lstm", "dilations": None, "residual": False,
        }  # fmt: skip
        words = [str(self.input_size), str(self.hidden_size)]
        words += [f"{n}={getattr(self, n)!r}" for n, d in defaults.items() if getattr(self, n) != d]
        return ", ".join(words)


def _checked(dilations: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The dilation of each layer."""
    if dilations is None:
        return tuple(2**layer for layer in range(num_layers))
    check_type("dilations", dilations, Sequence, "a sequence of integers")
    for place, dilation in enumerate(dilations):
        check_number(f"dilations[{place}]", dilation, at_least=1, integer=True)
    if len(dilations) != num_layers:
        raise ValueError(
            f"dilations must be {num_layers} in number, one for each layer, got {dilations!r}"
        )
    return tuple(dilations)
