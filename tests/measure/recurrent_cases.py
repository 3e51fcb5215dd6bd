"""Recurrent modules of every configuration, with inputs, states and gradients to match."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

KINDS = ("tanh", "relu", "lstm", "gru")


@dataclass(frozen=True)
class Case:
    kind: str = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    proj_size: int = 0
    layout: str = "padded"  # "padded", "unbatched", "packed", "packed unsorted"
    lengths: tuple[int, ...] = (7, 7, 7)
    input_size: int = 3
    hidden_size: int = 5
    hx: bool = False
    given: tuple[str, ...] = ("grad_output",)
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def build(self) -> Built:
        torch.manual_seed(self.seed)
        rnn = self.module()
        rows = rnn.num_layers * (1 + self.bidirectional)
        width = self.proj_size or self.hidden_size
        state = {"grad_hn": (rows, width), "grad_cn": (rows, self.hidden_size)}
        if self.layout != "unbatched":
            state = {name: (rows, len(self.lengths), size) for name, (rows, size) in state.items()}
        hx: Any = None
        if self.hx:
            parts = tuple(torch.randn(shape, dtype=self.dtype) for shape in state.values())
            hx = parts if self.kind == "lstm" else parts[0]
        grads: dict[str, Tensor | PackedSequence] = {
            name: torch.randn(shape, dtype=self.dtype)
            for name, shape in state.items()
            if name in self.given
        }
        if "grad_output" in self.given:
            grads["grad_output"] = self.sequences((1 + self.bidirectional) * width)
        return Built(self, rnn, self.sequences(self.input_size), hx, grads)

    def module(self) -> nn.RNN | nn.LSTM | nn.GRU:
        options: dict[str, Any] = {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "batch_first": self.batch_first,
            "bias": self.bias,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        if self.kind == "lstm":
            options["proj_size"] = self.proj_size
            return nn.LSTM(self.input_size, self.hidden_size, **options)
        if self.kind == "gru":
            return nn.GRU(self.input_size, self.hidden_size, **options)
        return nn.RNN(self.input_size, self.hidden_size, nonlinearity=self.kind, **options)

    def sequences(self, size: int) -> Tensor | PackedSequence:
        """Random values in the layout of this module's input."""
        steps, sequences = max(self.lengths), len(self.lengths)
        if self.layout == "unbatched":
            return torch.randn(steps, size, dtype=self.dtype)
        shape = (sequences, steps) if self.batch_first else (steps, sequences)
        padded = torch.randn(*shape, size, dtype=self.dtype)
        if self.layout == "padded":
            return padded
        return pack_padded_sequence(
            padded,
            torch.tensor(self.lengths),
            batch_first=self.batch_first,
            enforce_sorted=self.layout == "packed",
        )


@dataclass(frozen=True)
class Built:
    case: Case
    rnn: nn.RNN | nn.LSTM | nn.GRU
    input: Tensor | PackedSequence
    hx: Any
    grads: dict[str, Any] = field(repr=False)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(KINDS))
    layout = draw(st.sampled_from(["padded", "unbatched", "packed", "packed unsorted"]))
    steps = st.integers(1, 12)
    lengths = draw(st.lists(steps, min_size=1, max_size=5))
    if layout == "padded":
        lengths = [lengths[0]] * len(lengths)
    elif layout == "unbatched":
        lengths = lengths[:1]
    elif layout == "packed":
        lengths = sorted(lengths, reverse=True)
    hidden_size = draw(st.integers(1, 6))
    names = ["grad_output", "grad_hn"] + ["grad_cn"] * (kind == "lstm")
    return Case(
        kind=kind,
        num_layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bias=draw(st.booleans()),
        proj_size=draw(st.integers(0, hidden_size - 1)) if kind == "lstm" else 0,
        layout=layout,
        lengths=tuple(lengths),
        input_size=draw(st.integers(1, 6)),
        hidden_size=hidden_size,
        hx=draw(st.booleans()),
        given=tuple(draw(st.lists(st.sampled_from(names), min_size=1, unique=True))),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        seed=draw(st.integers(0, 2**16)),
    )
